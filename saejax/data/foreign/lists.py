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


def columns_of(batch: Any, path: pathlib.Path) -> dict[str, Any]:
    """The columns of a record batch by name; ValueError when two have the same."""
    names = batch.schema.names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has more than one column {twice[0]!r}; rename or remove one")
    return dict(zip(names, batch.columns, strict=True))


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
    asked = (wanted.field, wanted.tokens)
    kinds, numbers, unread = {}, [], []
    for name, column in head.items():
        column = getattr(column, "storage", column)
        kinds[name] = (str(column.type), (1,))  # what is told of a column that is not looked into
        numeric = any(word in str(column.type) for word in ("float", "double", "int"))
        nested = any(word in str(column.type) for word in ("struct", "map", "dictionary"))
        if not numeric or nested:
            continue
        numbers.append(name)
        if wanted.field is not None and name not in asked:
            continue
        try:
            array = array_of(column, f"{path}: {name!r}")
            kinds[name] = (array.dtype, array.shape)
        except ValueError as error:
            if name in asked:
                raise
            unread.append(str(error))
        except NotImplementedError:  # of a type that numpy lacks
            pass
    try:
        field = choose(kinds, wanted.field, path)
    except ValueError as error:
        raise ValueError("; ".join([str(error), *unread])) from error
    return field, choose_tokens(numbers if wanted.tokens is None else kinds, wanted.tokens, path)
