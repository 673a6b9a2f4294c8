"""Parquet files: a column of lists [D], or of lists of lists [T, D], of fixed size or not."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from saejax.data.foreign import lists
from saejax.data.foreign.interface import (
    Block,
    Foreign,
    Part,
    Wanted,
    as_contexts,
    check_tokens,
    files_in,
    float_type,
    per_piece,
)
from saejax.data.readers import extra


def matches(path: pathlib.Path) -> bool:
    """A .parquet file, or a folder with some."""
    return path.suffix == ".parquet" if path.is_file() else bool(files_in(path, "*.parquet"))


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """The file, or all of the folder."""
    files = [path] if path.is_file() else files_in(path, "*.parquet")
    return Foreign(parts=tuple(_part(file, wanted) for file in files))


def _part(path: pathlib.Path, wanted: Wanted) -> Part:
    table = _open(path)
    count = table.metadata.num_rows
    if not count:
        raise ValueError(f"{path} is empty; remove it")
    head = next(table.iter_batches(batch_size=1))
    columns = lists.columns_of(head, path)
    field, tokens = lists.names_of(columns, wanted, path)
    first = lists.array_of(columns[field], f"{path}: {field!r}")
    shape = as_contexts((count, *first.shape[1:]), f"{path}: {field!r}")
    if tokens is not None:
        ids = lists.array_of(columns[tokens], f"{path}: {tokens!r}")
        check_tokens(ids, (1, *shape[1:]), f"{path}: {tokens!r}, first row,")

    def blocks(rows: np.ndarray) -> Iterator[Block]:
        names = [field] if tokens is None else [field, tokens]
        for acts, *ids in lists.pick(_batches(path, names, rows, per_piece(shape)), rows, path):
            if acts.shape[1:] != first.shape[1:]:
                raise ValueError(f"{path}: {field!r} holds lists of different lengths")
            yield Block(
                acts=acts.reshape(-1, *shape[1:]),
                tokens=ids[0].reshape(-1, shape[1]) if ids else None,
            )

    return Part(
        path=path,
        name=path.name,
        shape=shape,
        dtype=float_type(first.dtype, f"{path}: {field!r}"),
        field=field,
        tokens=tokens is not None,
        read=blocks,
    )


def _open(path: pathlib.Path) -> Any:
    parquet = extra("pyarrow.parquet", f"{path}")
    errors = extra("pyarrow", f"{path}").ArrowException
    try:
        return parquet.ParquetFile(path)
    except (errors, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a sound parquet file: {error}") from error


def _batches(
    path: pathlib.Path, names: list[str], rows: np.ndarray, size: int
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Batches of the row groups that hold wanted rows."""
    table = _open(path)
    counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    bounds = np.cumsum([0, *counts])
    for group, first in enumerate(bounds[:-1].tolist()):
        if np.searchsorted(rows, first) == np.searchsorted(rows, bounds[group + 1]):
            continue
        try:
            for batch in table.iter_batches(batch_size=size, row_groups=[group], columns=names):
                yield first, {name: batch.column(name) for name in names}
                first += len(batch)
        except OSError as error:
            raise ValueError(f"{path} is damaged in row group {group}: {error}") from error
