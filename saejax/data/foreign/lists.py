"""Columns of lists, as parquet and Arrow files have them, to arrays."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from saejax.data.foreign.interface import Wanted, choose, choose_tokens


def array_of(column: Any, where: str) -> np.ndarray:
    """A column of lists, or lists of lists, of equal lengths as one array [n, ...].

    Args:
      column: a pyarrow array; extension types (`datasets`' Array2D) by what they store.
      where: for messages.

    Raises:
      ValueError: a null, or lists of different lengths.
    """
    column = getattr(column, "storage", column)
    shape = [len(column)]
    while "list" in str(column.type).split("<")[0]:
        if column.null_count:
            raise ValueError(f"{where} holds {column.null_count} empty cells (null)")
        inner = column.flatten()
        inner = getattr(inner, "storage", inner)
        width = len(inner) // max(1, len(column))
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if len(column) and (lengths != width).any():
            raise ValueError(
                f"{where} holds lists of different lengths ({lengths.min()} to {lengths.max()})"
            )
        shape.append(width)
        column = inner
    if column.null_count:
        raise ValueError(f"{where} holds {column.null_count} empty cells (null)")
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def pick(
    batches: Iterator[tuple[int, Mapping[str, Any]]], rows: np.ndarray, path: pathlib.Path
) -> Iterator[tuple[np.ndarray, ...]]:
    """The wanted rows out of batches in ascending order.

    Args:
      batches: (first row, columns by name).
      rows: ascending; every batch in between is passed over.
      path: of the file, for messages.
    """
    for first, columns in batches:
        count = len(next(iter(columns.values())))
        low, high = np.searchsorted(rows, [first, first + count])
        if low < high:
            local = rows[low:high] - first
            start, stop = int(local[0]), int(local[-1]) + 1
            yield tuple(
                array_of(column.slice(start, stop - start), f"{path}: {name!r}")[local - start]
                for name, column in columns.items()
            )


def names_of(head: Mapping[str, Any], wanted: Wanted, path: Any) -> tuple[str, str | None]:
    """The columns with the activations and with the tokens, judged by one row of each.

    Args:
      head: column by name, of one row each.
      wanted: what the user names.
      path: for messages.
    """
    kinds = {}
    for name, column in head.items():
        column = getattr(column, "storage", column)
        numeric = any(word in str(column.type) for word in ("float", "double", "int"))
        nested = any(word in str(column.type) for word in ("struct", "map", "dictionary"))
        if numeric and not nested:
            array = array_of(column, f"{path}: {name!r}")
            kinds[name] = (array.dtype, array.shape)
    field = choose(kinds, wanted.field, path)
    return field, choose_tokens(kinds, wanted.tokens, path)
