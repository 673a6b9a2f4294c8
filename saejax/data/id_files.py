"""Files of token ids: which there are, and the arrays in them, read a part at a time."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from saejax.data import readers
from saejax.data.corpus import named_files

SUFFIXES = (".npy", ".safetensors", ".parquet")


def token_files(source: str) -> list[tuple[pathlib.Path, str]]:
    """The files of `Tokens.source`; see `corpus.named_files`."""
    return named_files("Tokens.source", source, SUFFIXES)


@dataclasses.dataclass(frozen=True)
class IdArray:
    """An array in a file; `read(start, stop)` loads some of its first axis."""

    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]


def open_ids(path: pathlib.Path, field: str, offsets: str | None) -> tuple[IdArray, IdArray | None]:
    """The ids of a file, and its offsets if they are asked for.

    Raises:
      FileNotFoundError: no such file of offsets.
      ValueError: damaged, no such tensor, not integers, or another shape than [N, T] or [M].
    """
    if path.suffix.lower() == ".npy":
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


def _npy(path: pathlib.Path) -> IdArray:
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
    return IdArray(array.shape, lambda start, stop: np.asarray(array[start:stop]))


def _safetensors(path: pathlib.Path, name: str, setting: str) -> IdArray:
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
    return IdArray(tuple(found.get_shape()), lambda start, stop: found[start:stop])


def parquet_blocks(path: pathlib.Path, field: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Flat ids of some rows of a table, and the rows' lengths; a null for a row is an empty one.

    Raises:
      ValueError: the column holds no lists, or nulls among the ids.
    """
    rows = 0
    for column in readers.parquet_column(path, field, "Tokens.field"):
        if not hasattr(column, "flatten") or "list" not in str(column.type):
            raise ValueError(
                f"{path}: column {field!r} (Tokens.field) holds {column.type}, not lists of ids"
            )
        lengths = readers.extra("pyarrow.compute", str(path)).list_value_length(column)
        lengths = lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        ids = column.flatten()
        if ids.null_count:
            at = np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0]
            row = rows + int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise _has_null(f"{path}, row {row}: column {field!r} (Tokens.field)")
        rows += len(lengths)
        yield ids.to_numpy(zero_copy_only=False), lengths


def list_of_ids(row: Any, where: str) -> np.ndarray:
    """One row of a streamed dataset; None is an empty one.

    Raises:
      ValueError: no flat list, or nulls in it.
    """
    if row is None:
        return np.zeros(0, np.int64)
    try:
        ids = np.asarray(row)
    except ValueError as error:
        raise ValueError(f"{where}: not a list of ids: {error}") from error
    if ids.ndim != 1:
        raise ValueError(f"{where}: an array of shape {ids.shape}, not a list of ids")
    if ids.dtype == object and None in row:
        raise _has_null(where)
    return ids if len(ids) else ids.astype(np.int64)


def _has_null(where: str) -> ValueError:
    return ValueError(
        f"{where} holds a null among its ids; give integers only (Tokens.pad_id says with which id "
        "rows are filled up)"
    )
