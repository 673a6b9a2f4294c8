"""Activations cached by SAELens (CacheActivationsRunner): an Arrow dataset on disk.

A column named by the hook, lists of lists [context_size, d_in], and `token_ids` [context_size].
The order of its files is in state.json. SAELens keeps BOS in its contexts; see `--bos`.
"""

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
    float_type,
    pieces,
    read_json,
)
from saejax.data.readers import extra

_INFO, _STATE = "dataset_info.json", "state.json"


def matches(path: pathlib.Path) -> bool:
    """A folder that `Dataset.save_to_disk` wrote."""
    return (path / _INFO).is_file() and (path / _STATE).is_file()


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """All files of the dataset."""
    listed = read_json(path / _STATE).get("_data_files")
    if not listed:
        raise ValueError(f"{path / _STATE} lists no data files: the cache is unfinished")
    files = [path / entry["filename"] for entry in listed]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing, and {_STATE} lists it")
    parts = tuple(part for file in files if (part := _part(file, wanted)) is not None)
    if not parts:
        raise ValueError(f"{path} holds no rows")
    return Foreign(parts=parts, known={"site": parts[0].field})


def _part(path: pathlib.Path, wanted: Wanted) -> Part | None:
    count, head = 0, None
    for _, columns in _batches(path):
        size = len(next(iter(columns.values())))
        if head is None and size:
            head = {name: column.slice(0, 1) for name, column in columns.items()}
        count += size
    if head is None:
        return None
    field, tokens = lists.names_of(head, wanted, path)
    where = f"{path}: {field!r}"
    first = lists.array_of(head[field], where)
    shape = as_contexts((count, *first.shape[1:]), where)
    if tokens is not None:
        check_tokens(lists.array_of(head[tokens], path), (1, *shape[1:]), f"{path}: {tokens!r}")

    def blocks(rows: np.ndarray) -> Iterator[Block]:
        names = [field] if tokens is None else [field, tokens]
        for some in pieces(rows, shape):
            for acts, *ids in lists.pick(_batches(path, names), some, path):
                if acts.shape[1:] != first.shape[1:]:
                    raise ValueError(f"{where} holds lists of different lengths")
                yield Block(
                    acts=acts.reshape(-1, *shape[1:]),
                    tokens=ids[0].reshape(-1, shape[1]) if ids else None,
                )

    return Part(
        path=path,
        name=path.name,
        shape=shape,
        dtype=float_type(first.dtype, where),
        field=field,
        tokens=tokens is not None,
        read=blocks,
    )


def _batches(
    path: pathlib.Path, names: list[str] | None = None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The record batches of a file, mapped into memory: first row and columns by name."""
    arrow = extra("pyarrow", f"{path}")
    first = 0
    try:
        with arrow.memory_map(str(path)) as file, arrow.ipc.open_stream(file) as stream:
            for batch in stream:
                columns = lists.columns_of(batch, path)
                yield first, {n: columns[n] for n in names or columns}
                first += len(batch)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is truncated, or no Arrow stream: {error}") from error
