"""Caches of dictionary_learning's ActivationCache, one folder a submodule.

config.json and `shard_0.memmap` with `shard_0.meta` (rows [N, D] of all contexts, padding left
out; bfloat16 as int16), and beside the folder `tokens.pt` [N] and `sequence_ranges.pt` [n + 1],
where each context begins. Only its development versions write one: the package dictionary-learning
0.1.0 has no cache on disk, and neither has sparsify.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from saejax.data.foreign import torch_files
from saejax.data.foreign.interface import (
    BFLOAT16,
    Block,
    Foreign,
    Part,
    Wanted,
    as_contexts,
    files_in,
    float_type,
    pieces,
    read_json,
)
from saejax.data.layout import MASKED

_CONFIG = "config.json"
_PADDING = MASKED.index("padding")


def matches(path: pathlib.Path) -> bool:
    """A folder of one submodule."""
    return (path / _CONFIG).is_file() and bool(files_in(path, "shard_*.memmap"))


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """The shards as one part, because contexts go across them."""
    if wanted.field is not None or wanted.tokens is not None:
        raise ValueError(f"{path}: this cache has no named fields; leave out --field")
    config = read_json(path / _CONFIG)
    files = [
        path / f"shard_{i}.memmap" for i in range(_known(config, "shard_count", path / _CONFIG))
    ]
    shards = [_shard(file) for file in files]
    rows = _Rows(shards)
    tokens = starts = None
    beside = (path.parent / "tokens.pt", path.parent / "sequence_ranges.pt")
    if config.get("store_tokens"):
        tokens = np.asarray(torch_files.load(beside[0]))
        if tokens.shape != (rows.count,):
            raise ValueError(f"{beside[0]} has shape {tokens.shape}: not of {rows.count} rows")
    if config.get("store_sequence_ranges"):
        starts = np.asarray(torch_files.load(beside[1]))
        if starts[0] != 0 or starts[-1] != rows.count or (np.diff(starts) < 0).any():
            raise ValueError(f"{beside[1]}: contexts do not begin at 0 and end at {rows.count}")
        starts = np.unique(starts)  # a context may be empty
    part = _part(path, files, rows, tokens, starts)
    return Foreign(parts=(part,), known={"site": path.resolve().name})


def _part(
    path: pathlib.Path,
    files: list[pathlib.Path],
    rows: "_Rows",
    tokens: np.ndarray | None,
    starts: np.ndarray | None,
) -> Part:
    if starts is None:
        starts, length = np.arange(rows.count + 1), 1
    else:
        length = int(np.diff(starts).max())
    shape = (len(starts) - 1, length, rows.width)

    def blocks(wanted: np.ndarray) -> Iterator[Block]:
        for some in pieces(wanted, shape):
            at = starts[some][:, None] + np.arange(length)
            kept = at < starts[some + 1][:, None]
            at = np.where(kept, at, starts[some][:, None])
            yield Block(
                acts=np.where(kept[..., None], rows.take(at), 0).astype(rows.dtype),
                tokens=None if tokens is None else np.where(kept, tokens[at], 0),
                masked=np.where(kept, 0, _PADDING).astype(np.uint8),
            )

    return Part(
        path=path,
        name=path.name,
        shape=shape,
        dtype=float_type(rows.dtype, path),
        field="",
        tokens=tokens is not None,
        read=blocks,
        files=(path / _CONFIG, *files),
    )


class _Rows:
    """The rows of all shards under one index."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        kinds = {(shard.shape[1], shard.dtype) for shard in shards}
        if len(kinds) != 1:
            raise ValueError(f"shards of one cache differ in width or type: {kinds}")
        self._shards = shards
        self._bounds = np.cumsum([0, *map(len, shards)])
        self.count = int(self._bounds[-1])
        (self.width, self.dtype), *_ = kinds

    def take(self, at: np.ndarray) -> np.ndarray:
        flat = at.ravel()
        found = np.empty((len(flat), self.width), self.dtype)
        which = np.searchsorted(self._bounds, flat, side="right") - 1
        for shard in np.unique(which):
            mine = which == shard
            found[mine] = self._shards[shard][flat[mine] - self._bounds[shard]]
        return found.reshape(*at.shape, self.width)


def _known(about: Mapping[str, Any], field: str, path: pathlib.Path) -> Any:
    if field not in about:
        raise ValueError(f"{path} has no {field!r}: not a whole cache; write it again")
    return about[field]


def _shard(path: pathlib.Path) -> np.ndarray:
    about = read_json(path.with_suffix(".meta"))
    shape = tuple(_known(about, "shape", path.with_suffix(".meta")))
    as_contexts(shape, str(path))
    name = about.get("dtype", "float32").removeprefix("torch.")
    dtype = BFLOAT16 if name == "bfloat16" else np.dtype(name)
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, not the {expected} of {shape} {dtype.name}")
    return np.memmap(path, dtype, "r", shape=shape)
