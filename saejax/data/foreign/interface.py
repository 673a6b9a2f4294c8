"""What a format of activations made elsewhere must tell, and what its readers share.

A source is a list of files (`Part`), each with a shape that is known without reading the data. A
part gives any of its contexts, in ascending order, a few at a time, so that no file is ever held
whole. Where a format has no contexts, each row is a context of one token.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from saejax.data.layout import MASKED

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = ("float16", "bfloat16", "float32", "float64")
_FLOATS_TOLD = f"{', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
TOKENS = ("tokens", "input_ids", "token_ids")
PIECE = 32 << 20  # bytes of contexts handed over at once
_BOS, _SPECIAL, _PADDING = (MASKED.index(reason) for reason in ("bos", "special", "padding"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user names of a source.

    Attributes:
      field: tensor or column with the activations; None takes the only one that can be meant.
      tokens: tensor or column with the token ids; None takes one of `TOKENS` where there is one.
    """

    field: str | None = None
    tokens: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unread:
    """A tensor of a type that is not supported; it stands for it in messages."""

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Some contexts of a part.

    Attributes:
      acts: [n, T, D], of the part's float type.
      tokens: [n, T] integers, or None.
      masked: uint8 [n, T], codes of `layout.MASKED`; None where the format masks nothing.
      origin: int64 [n, 3], context id, document and token offset as the format has them; None
        where it has none.
    """

    acts: np.ndarray
    tokens: np.ndarray | None = None
    masked: np.ndarray | None = None
    origin: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One file, or a few that belong together.

    Attributes:
      path: the file, for messages.
      name: what it is called as a document.
      shape: (contexts, tokens a context, width).
      dtype: name of the float type.
      field: the tensor or column.
      tokens: whether there are token ids.
      read: ascending indices of contexts to blocks that hold them in that order.
      files: everything it consists of, if that is more than `path`.
    """

    path: pathlib.Path
    name: str
    shape: tuple[int, int, int]
    dtype: str
    field: str
    tokens: bool
    read: Callable[[np.ndarray], Iterator[Block]]
    files: tuple[pathlib.Path, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """A source of activations made elsewhere.

    Attributes:
      parts: its files, in order.
      filtered: whether rows that should not be stored have been left out already.
      known: what the format says of the fields of a `StoreSpec`: subject, site, ...
      documents: names of the documents that `Block.origin` points to; None for the parts' own.
    """

    parts: tuple[Part, ...]
    filtered: bool = False
    known: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    documents: tuple[str, ...] | None = None


def files_in(folder: pathlib.Path, *patterns: str) -> list[pathlib.Path]:
    """Files of a folder that match, with numbers in names in the order of numbers.

    Raises:
      FileNotFoundError: one is a link to nothing; without it the source would not be whole.
    """
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    for file in sorted(found):
        if file.is_symlink() and not file.exists():
            raise FileNotFoundError(
                f"{file} is a link to {file.readlink()}, which is missing; mend or remove the link"
            )
    return sorted(filter(pathlib.Path.is_file, found), key=lambda file: _natural(file.name))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(s), "") if s.isdigit() else (-1, s) for s in re.split(r"(\d+)", name)]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def _name_of(dtype: Any) -> str:
    return dtype if isinstance(dtype, str) else np.dtype(dtype).name


def float_type(dtype: Any, where: str) -> str:
    """Name of the type of activations; `dtype` is of numpy, or text where it is not supported.

    Raises:
      ValueError: not one of `FLOATS`.
    """
    name = _name_of(dtype)
    if isinstance(dtype, str) or name not in FLOATS:
        raise ValueError(
            f"{where} is of type {name}: activations must be {_FLOATS_TOLD}; name the tensor that "
            "holds them (--field), or convert it"
        )
    return name


def as_contexts(shape: Sequence[int], where: str) -> tuple[int, int, int]:
    """(contexts, tokens, width) of an array of rows [N, D] or of contexts [N, T, D].

    Raises:
      ValueError: another number of axes, or nothing in it.
    """
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{where} has shape {tuple(shape)}: give rows [N, D] or contexts [N, T, D]"
        )
    if 0 in shape:
        raise ValueError(f"{where} is empty: its shape is {tuple(shape)}; remove it")
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, shape[1])


def choose(kinds: Mapping[str, tuple[Any, Sequence[int]]], field: str | None, path: Any) -> str:
    """The tensor that holds the activations.

    Args:
      kinds: type and shape of each tensor by name; a type that is not supported is text.
      field: the one asked for; None takes the only tensor of floats with two or three axes.
      path: of the file, for messages.

    Raises:
      ValueError: no such tensor, one of a type that is not supported, or it is not clear which.
    """
    told = ", ".join(f"{n} {_name_of(d)}{list(s)}" for n, (d, s) in kinds.items()) or "nothing"
    if field is not None:
        if field not in kinds:
            raise ValueError(f"{path} has no {field!r} (--field); it has {told}")
        if isinstance(kinds[field][0], str):  # raises
            float_type(kinds[field][0], f"{path}: {field!r}")
        return field
    fit = [
        name
        for name, (dtype, shape) in kinds.items()
        if not isinstance(dtype, str) and dtype.name in FLOATS and len(shape) in (2, 3)
    ]
    if not fit:
        raise ValueError(
            f"{path} holds {told}; none of them can be activations: give {_FLOATS_TOLD}, as rows "
            "[N, D] or contexts [N, T, D]"
        )
    if len(fit) > 1:
        raise ValueError(
            f"{path} holds {told}; more than one of them can be activations: name one with --field"
        )
    return fit[0]


def choose_tokens(names: Iterable[str], wanted: str | None, path: Any) -> str | None:
    """The tensor with the token ids, or None; ValueError when the one asked for is missing."""
    names = list(names)
    if wanted is not None:
        if wanted not in names:
            raise ValueError(f"{path} has no {wanted!r} (--tokens_field); it has {names}")
        return wanted
    return next((name for name in TOKENS if name in names), None)


Opener = Callable[[pathlib.Path], Mapping[str, np.ndarray | Unread]]
Masker = Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray | None]


def part_of_tensors(
    path: pathlib.Path,
    opener: Opener,
    wanted: Wanted,
    *,
    name: str | None = None,
    masker: Masker | None = None,
) -> Part:
    """A file of named arrays that are mapped into memory, not read.

    Args:
      path: the file.
      opener: maps its arrays.
      wanted: which of them.
      name: as a document; its file name by default.
      masker: (arrays, contexts) to `Block.masked`.

    Raises:
      ValueError: no or several tensors that could be meant; wrong type or shape.
    """
    arrays = opener(path)
    field = choose({n: (a.dtype, a.shape) for n, a in arrays.items()}, wanted.field, path)
    where = f"{path}: {field!r}" if field else str(path)
    dtype = float_type(arrays[field].dtype, where)
    shape = as_contexts(arrays[field].shape, where)
    tokens = choose_tokens(arrays, wanted.tokens, path)
    if tokens is not None:
        check_tokens(arrays[tokens], shape, f"{path}: {tokens!r}")

    def read(rows: np.ndarray) -> Iterator[Block]:
        # Mapped anew, so that a source of many files does not stay open.
        found = opener(path)
        acts = found[field] if field in found else np.empty(0)
        if acts.dtype.name != dtype or as_contexts(acts.shape, where) != shape:
            raise ValueError(f"{path} changed while it was being read; start again")
        for some in pieces(rows, shape):
            yield Block(
                acts=np.asarray(acts[some]).reshape(-1, *shape[1:]),
                tokens=None
                if tokens is None
                else np.asarray(found[tokens][some]).reshape(-1, shape[1]),
                masked=masker(found, some) if masker else None,
            )

    return Part(
        path=path,
        name=name or path.name,
        shape=shape,
        dtype=dtype,
        field=field,
        tokens=tokens is not None,
        read=read,
    )


def check_tokens(tokens: Any, shape: tuple[int, int, int], where: str) -> None:
    """ValueError unless there is one integer for each activation."""
    if isinstance(tokens, Unread) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{where} is of type {_name_of(tokens.dtype)}: token ids must be integers")
    fit = [(shape[0], shape[1])] + ([(shape[0],)] if shape[1] == 1 else [])
    if tuple(tokens.shape) not in fit:
        raise ValueError(
            f"{where} has shape {tuple(tokens.shape)}, but there are {shape[0]} contexts of "
            f"{shape[1]} activations"
        )


def pieces(rows: np.ndarray, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Indices of contexts in runs of about `PIECE` bytes."""
    step = per_piece(shape)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def per_piece(shape: tuple[int, int, int]) -> int:
    """Contexts in a piece."""
    return max(1, PIECE // (shape[1] * shape[2] * 4))


def codes_of_kept(kept: np.ndarray) -> np.ndarray:
    """uint8 [n, T] codes of `layout.MASKED` of a mask that does not say why.

    What follows the last kept position is padding, what is left out at the first one BOS, and
    everything else special.
    """
    kept = np.asarray(kept, bool)
    codes = np.where(kept, 0, _SPECIAL).astype(np.uint8)
    codes[:, 0][~kept[:, 0]] = _BOS
    after = np.cumsum(kept[:, ::-1], axis=1)[:, ::-1] == 0
    codes[after] = _PADDING
    return codes


def bytes_of(path: pathlib.Path) -> np.ndarray:
    """The bytes of a file as a read-only map, uint8 [n]; ValueError when it is empty."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; remove it or make it again")
    return np.memmap(path, np.uint8, "r")
