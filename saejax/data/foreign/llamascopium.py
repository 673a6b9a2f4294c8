"""Chunks of Llamascopium (Language-Model-SAEs), one folder a hook point.

`chunk-00000000.safetensors` or `shard-0-chunk-00000000.safetensors` (also `.pt`) with `activation`
[n, T, D], `tokens` and, since 2025, `mask` and `attention_mask` [n, T]: 1 where an activation
counts. Both masks are honoured.
"""

import pathlib
import re
from collections.abc import Mapping

import numpy as np

from saejax.data.foreign import tensors, torch_files
from saejax.data.foreign.interface import (
    Foreign,
    Unread,
    Wanted,
    codes_of_kept,
    files_in,
    part_of_tensors,
)

_NAME = re.compile(r"(?:shard-(\d+)-)?chunk-(\d+)\.(safetensors|pt)")
_MASKS = ("mask", "attention_mask")


def matches(path: pathlib.Path) -> bool:
    """A folder with chunks."""
    return path.is_dir() and bool(_chunks(path))


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """All chunks, by shard and number."""
    wanted = Wanted(field=wanted.field or "activation", tokens=wanted.tokens)
    parts = []
    for file in _chunks(path):
        opener = tensors.open_tensors if file.suffix == ".safetensors" else torch_files.open_tensors
        part = part_of_tensors(file, opener, wanted, masker=_masked)
        for name, array in opener(file).items():
            if name in _MASKS and isinstance(array, Unread):
                raise ValueError(f"{file}: {name!r} is of type {array.dtype}: give BOOL or I32")
            if name in _MASKS and array.shape != part.shape[:2]:
                raise ValueError(
                    f"{file}: {name!r} has shape {array.shape}, the activations {part.shape}"
                )
        parts.append(part)
    return Foreign(parts=tuple(parts), known={"site": path.resolve().name})


def _chunks(folder: pathlib.Path) -> list[pathlib.Path]:
    found = [
        file
        for file in files_in(folder, "*chunk-*.safetensors", "*chunk-*.pt")
        if _NAME.fullmatch(file.name)
    ]
    return sorted(found, key=lambda file: _order(file.name))


def _order(name: str) -> tuple[int, int]:
    shard, chunk, _ = _NAME.fullmatch(name).groups()
    return int(shard or 0), int(chunk)


def _masked(arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray | None:
    masks = [np.asarray(arrays[name][rows]) != 0 for name in _MASKS if name in arrays]
    return codes_of_kept(np.logical_and.reduce(masks)) if masks else None
