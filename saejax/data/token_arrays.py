"""Token ids made elsewhere: .npy, safetensors, parquet and Hugging Face datasets."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np

from saejax.data import readers, splits
from saejax.data.corpus import Bos, Tails, walk
from saejax.data.progress import Progress
from saejax.data.readers import EMPTY, HUB
from saejax.data.splits import Split
from saejax.data.tokens import TokenDocument, Tokenizer, resolve_bos

SUFFIXES = (".npy", ".safetensors", ".parquet")
_BLOCK_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Token ids made elsewhere: where they are, how they are split and cut into contexts.

    Attributes:
      source: path of a .npy, .safetensors or .parquet file or of a folder of such, or
        'hf:owner/name', a dataset of the Hugging Face hub (parquet and 'hf:' need the packages
        pyarrow and datasets). Each row of a matrix [N, T], and each list of a table, is a document.
      field: tensor of a .safetensors file, or column of a table, that holds the ids.
      offsets: of a flat array, where its documents begin, ascending from 0: another .npy file, or
        another tensor of the same .safetensors file.
      separator: of a flat array without offsets, the id that begins every document. Of a subject
        without a tokenizer it is taken to be a special token, as the ids are that its config.json
        names: bos_token_id, eos_token_id and pad_token_id.
      pad_id: id that fills rows up on their right; it is cut off, and may lie outside the
        vocabulary, as -1 or -100 do. None: rows are full.
      name: configuration ("subset") of the Hugging Face dataset.
      split: its split; both of ours are cut out of this one.
      revision: its branch, tag or commit.
      held_out_percent: share of the documents held out, chosen by the sha256 of `file:number`.
      max_tokens: at most so many tokens in each split. None takes all.
      max_documents: at most so many documents in each split.
      take: which documents a limit takes; see `TextConfig`.
      bos: where a beginning-of-sequence token is put; 'none' where the ids have theirs already.
      tails: what is left of a document after its last full context: 'drop' or 'pad'.
      min_tail: shortest tail that is padded, in tokens.
      cache: folder in which contexts are kept for the next run; None keeps nothing.
    """

    source: str
    field: str = "input_ids"
    offsets: str | None = None
    separator: int | None = None
    pad_id: int | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    held_out_percent: float = 5.0
    max_tokens: int | None = None
    max_documents: int | None = None
    take: Literal["auto", "sample", "first"] = "auto"
    bos: Bos = "none"
    tails: Tails = "drop"
    min_tail: int = 16
    cache: str | None = None

    def __post_init__(self):
        for field in ("source", "field", "split"):
            if not getattr(self, field):
                raise ValueError(f"Tokens.{field} is empty: give a name")
        splits.check(self, "Tokens", "max_tokens", "max_documents")
        if self.separator is not None and self.separator < 0:
            raise ValueError(f"Tokens.separator = {self.separator}: give an id, 0 or more, or None")
        if self.offsets is not None and self.separator is not None:
            raise ValueError("Tokens.offsets and Tokens.separator say the same; give one of them")


class IdsOnly:
    """Stands in for a tokenizer where there is none: the size of the vocabulary, and special ids.

    No text can be encoded, and no bytes are known; a token reads as `[id]`.
    """

    default_bos, byte_exact = "none", False

    def __init__(
        self,
        vocab_size: int,
        *,
        bos: int | None = None,
        eos: Iterable[int] = (),
        special: Iterable[int] = (),
    ):
        """Takes the number of ids, 0 to vocab_size - 1, and which of them are known to be special.

        Args:
          vocab_size: number of ids.
          bos: begins a text.
          eos: end a text; rows are padded with the first, or with 0.
          special: further ids that stand for no text.
        """
        inside = [i for i in eos if 0 <= i < vocab_size]
        self.vocab_size, self.max_id = vocab_size, vocab_size - 1
        self.bos_id = bos if bos is not None and 0 <= bos < vocab_size else None
        self.eot_id = inside[0] if inside else 0
        known = {*inside, *special, *(() if bos is None else (bos,))}
        self.special_ids = frozenset(i for i in known if 0 <= i < vocab_size)
        self.fingerprint = f"ids below {vocab_size}"
        if self.special_ids:
            self.fingerprint += f", special {sorted(self.special_ids)}"

    def with_special(self, *ids: int | None) -> IdsOnly:
        """The same with further special ids; None is none."""
        more = {i for i in ids if i is not None}
        eos = (self.eot_id,) if self.eot_id in self.special_ids else ()
        return IdsOnly(self.vocab_size, bos=self.bos_id, eos=eos, special=self.special_ids | more)

    def encode(self, text: str) -> list[int]:
        """Refuses.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "text cannot be encoded without a tokenizer: give a model folder with tokenizer.json"
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Refuses any text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """`[id]` for each."""
        return "".join(map(self.token_text, ids))

    def ids(self) -> list[int]:
        """All ids, ascending."""
        return list(range(self.vocab_size))

    def token_bytes(self, token: int) -> bytes:
        """None are known."""
        return b""

    def token_text(self, token: int) -> str:
        """`[id]`."""
        return f"[{int(token)}]"


class TokenDocuments(splits.SplitReader):
    """The documents of one split of a source of ids; see `splits.SplitReader`."""

    def __init__(
        self,
        cfg: TokensConfig,
        split: Split,
        tokenizer: Tokenizer,
        progress: Progress | None = None,
    ):
        """Reads nothing yet; `progress` is told of every document that is read.

        Raises:
          ValueError: no such split.
        """
        super().__init__(cfg, split, label="Tokens", limit="max_tokens")
        self._progress = progress or Progress(None, "")
        self.first = cfg.take == "first" or (cfg.take == "auto" and cfg.source.startswith(HUB))
        self._vocab_size = tokenizer.vocab_size
        self._begins = None if resolve_bos(tokenizer, cfg.bos) == "none" else tokenizer.bos_id

    def read(self, left_out: Counter[str]) -> Iterator[TokenDocument]:
        """All documents of both splits, by file name and inside a file as they stand."""
        for name, ids in self._progress.reading(self._named()):
            if self.cfg.pad_id is not None:
                real = np.flatnonzero(ids != self.cfg.pad_id)
                ids = ids[: real[-1] + 1 if len(real) else 0]
                if not 0 <= self.cfg.pad_id < self._vocab_size and len(real) < len(ids):
                    raise ValueError(
                        f"{name}: Tokens.pad_id = {self.cfg.pad_id} stands before other ids, and "
                        "is outside the tokenizer's vocabulary; pad rows on their right"
                    )
            if not len(ids):
                left_out[EMPTY] += 1
                continue
            if self._begins is not None and ids[0] == self._begins:
                raise ValueError(
                    f"{name} begins with the BOS token {self._begins} already, and Tokens.bos = "
                    f"{self.cfg.bos!r} would put another before it; set Tokens.bos = 'none'"
                )
            digest = hashlib.sha256(ids.astype("<u4").tobytes()).digest()
            yield TokenDocument(name, ids, -1, digest)

    def size(self, document: TokenDocument) -> int:
        """Tokens."""
        return len(document.ids)

    def nothing(self) -> str:
        """What to do when there are no ids at all."""
        return f"holds no tokens: give a file, or a folder, with {', '.join(SUFFIXES)} files"

    def _named(self) -> Iterator[tuple[str, np.ndarray]]:
        cfg = self.cfg
        if cfg.source.startswith(HUB):
            prefix = "/".join(filter(None, (cfg.source.removeprefix(HUB), cfg.name, cfg.split)))
            rows = readers.hub_rows(
                cfg.source, cfg.name, cfg.split, cfg.revision, cfg.field, "Tokens.field"
            )
            for number, row in enumerate(rows):
                name = f"{prefix}:{number}"
                yield name, self._checked(_list_of_ids(row, name), name)
            return
        for path, name in token_files(cfg.source):
            if name == cfg.offsets or path == pathlib.Path(cfg.offsets or "").expanduser():
                continue
            number = 0
            for block, lengths in self._blocks(path):
                ids = self._checked(block, f"{path}, from document {number}")
                for row in np.split(ids, np.cumsum(lengths)[:-1]):
                    yield f"{name}:{number}", row
                    number += 1

    def _checked(self, ids: np.ndarray, where: str) -> np.ndarray:
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{where}: ids of dtype {ids.dtype}, not integers; give token ids")
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0 or high >= self._vocab_size:  # of padding, or wrong
            strange = (ids < 0) | (ids >= self._vocab_size)
            if self.cfg.pad_id is not None:
                strange &= ids != self.cfg.pad_id
            if not strange.any():
                return ids
            at = int(np.flatnonzero(strange)[0])
            wrong = int(ids[at])
            raise ValueError(
                f"{where}: id {wrong} (token {at}) is outside the tokenizer's vocabulary (0 .. "
                f"{self._vocab_size - 1}); use ids of the subject's own tokenizer"
            )
        return ids

    def _blocks(self, path: pathlib.Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Flat ids of whole documents and their lengths, about a million tokens at a time."""
        if path.suffix == ".parquet":
            yield from _parquet_blocks(path, self.cfg.field)
            return
        array, beside = _open(path, self.cfg.field, self.cfg.offsets)
        if len(array.shape) == 2:
            n, width = array.shape
            step = max(1, _BLOCK_TOKENS // max(1, width))
            for start in range(0, n, step):
                block = array.read(start, min(n, start + step))
                yield block.reshape(-1), np.full(len(block), width)
            return
        starts = self._starts(path, array, beside)
        bounds = np.append(starts, array.shape[0])
        first = 0
        while first < len(starts):
            last = int(np.searchsorted(bounds, bounds[first] + _BLOCK_TOKENS, side="right")) - 1
            last = min(max(last, first + 1), len(starts))
            yield (
                array.read(int(bounds[first]), int(bounds[last])),
                np.diff(bounds[first : last + 1]),
            )
            first = last

    def _starts(self, path: pathlib.Path, array: _Array, beside: _Array | None) -> np.ndarray:
        """Where the documents of a flat array begin."""
        length = array.shape[0]
        if beside is not None:
            starts = np.asarray(beside.read(0, beside.shape[0]))
            if starts.ndim == 1 and len(starts) > 1 and starts[-1] == length:
                starts = starts[:-1]  # the end of the last document is given too
            sound = starts.ndim == 1 and len(starts) and np.issubdtype(starts.dtype, np.integer)
            starts = starts.astype(np.int64) if sound else starts
            if not sound or starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] >= length:
                raise ValueError(
                    f"Tokens.offsets = {self.cfg.offsets!r} must hold integers that ascend from 0 "
                    f"and end below {length}, the length of {path}"
                )
            return starts
        if self.cfg.separator is None:
            raise ValueError(
                f"{path} is a flat array of {length} ids: say where its documents begin with "
                "Tokens.offsets or Tokens.separator, or reshape it to [N, T]"
            )
        found = [np.zeros(1, np.int64)]
        for start in range(0, length, _BLOCK_TOKENS):
            block = array.read(start, min(length, start + _BLOCK_TOKENS))
            found.append(start + np.flatnonzero(block == self.cfg.separator))
        return np.unique(np.concatenate(found))


def token_files(source: str) -> list[tuple[pathlib.Path, str]]:
    """The files of a path and what their documents are called, sorted by name.

    Raises:
      FileNotFoundError: no such path.
      ValueError: a file of another kind.
    """
    root = pathlib.Path(source).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"Tokens.source = {source!r}: no such file or folder; give one that exists"
        )
    if root.is_dir():
        return [(root / name, name) for name in sorted(walk(root, SUFFIXES, frozenset()))]
    if root.suffix not in SUFFIXES:
        raise ValueError(f"Tokens.source = {source!r}: a file must end in {', '.join(SUFFIXES)}")
    return [(root, root.name)]


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array in a file; `read(start, stop)` loads some of its first axis."""

    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]


def _open(path: pathlib.Path, field: str, offsets: str | None) -> tuple[_Array, _Array | None]:
    """The ids of a file, and its offsets if they are asked for."""
    if path.suffix == ".npy":
        beside = _npy(pathlib.Path(offsets).expanduser()) if offsets else None
        array = _npy(path)
    else:
        array = _safetensors(path, field, "Tokens.field")
        beside = _safetensors(path, offsets, "Tokens.offsets") if offsets else None
    if len(array.shape) not in (1, 2):
        raise ValueError(f"{path}: shape {array.shape}; give rows of ids [N, T], or flat ids [M]")
    if len(array.shape) == 2 and beside is not None:
        raise ValueError(
            f"{path} is a matrix {array.shape}, whose rows are the documents: leave out "
            "Tokens.offsets"
        )
    return array, beside


def _npy(path: pathlib.Path) -> _Array:
    if not path.is_file():
        raise FileNotFoundError(f"Tokens.offsets = {str(path)!r}: no such file")
    try:
        array = readers.open_npy(path)
    except ValueError as error:
        if "object" in str(error.__cause__).lower():
            raise ValueError(
                f"{path} holds objects (rows of different lengths?), not integers: give equal "
                "rows, or a flat array with Tokens.offsets"
            ) from error
        raise
    return _Array(array.shape, lambda start, stop: np.asarray(array[start:stop]))


def _safetensors(path: pathlib.Path, name: str, setting: str) -> _Array:
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
        names = list(file.keys())
        found = file.get_slice(name) if name in names else None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error
    if found is None:
        raise ValueError(f"{path} has no tensor {name!r} ({setting}); it has {', '.join(names)}")
    kind = found.get_dtype()
    if not kind.startswith(("I", "U")):
        raise ValueError(f"{path}: tensor {name!r} is of dtype {kind}, not integers")
    return _Array(tuple(found.get_shape()), lambda start, stop: found[start:stop])


def _parquet_blocks(path: pathlib.Path, field: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for column in readers.parquet_column(path, field, "Tokens.field"):
        if not hasattr(column, "flatten") or "list" not in str(column.type):
            raise ValueError(
                f"{path}: column {field!r} (Tokens.field) holds {column.type}, not lists of ids"
            )
        lengths = readers.extra("pyarrow.compute", str(path)).list_value_length(column)
        lengths = lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        yield column.flatten().to_numpy(zero_copy_only=False), lengths


def _list_of_ids(row: Any, where: str) -> np.ndarray:
    if row is None:
        return np.zeros(0, np.int64)
    try:
        ids = np.asarray(row)
    except ValueError as error:
        raise ValueError(f"{where}: not a list of ids: {error}") from error
    if ids.ndim != 1:
        raise ValueError(f"{where}: an array of shape {ids.shape}, not a list of ids")
    return ids if len(ids) else ids.astype(np.int64)
