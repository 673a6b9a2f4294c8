"""`.npy` files: rows [N, D] or contexts [N, T, D]."""

import pathlib
from collections.abc import Mapping

import numpy as np

from saejax.data.foreign.interface import (
    BFLOAT16,
    Foreign,
    Part,
    Wanted,
    files_in,
    part_of_tensors,
)
from saejax.data.readers import open_npy


def matches(path: pathlib.Path) -> bool:
    """A .npy file, or a folder with some."""
    return path.suffix == ".npy" if path.is_file() else bool(files_in(path, "*.npy"))


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """The file, or all of the folder; they hold no tokens."""
    if wanted.field is not None or wanted.tokens is not None:
        raise ValueError(f"{path}: a .npy file has no named fields; leave out --field")
    files = [path] if path.is_file() else files_in(path, "*.npy")
    return Foreign(parts=tuple(_part(file) for file in files))


def _part(file: pathlib.Path) -> Part:
    return part_of_tensors(file, _open, Wanted(field=""))


def _open(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    array = open_npy(path)
    # numpy does not know bfloat16, and writes it as two bytes of no type.
    return {"": array.view(BFLOAT16) if array.dtype == np.dtype("V2") else array}
