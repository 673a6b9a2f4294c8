"""safetensors files: any tensor, by name; mapped into memory, bfloat16 included."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from saejax.data.foreign.interface import (
    Foreign,
    Unread,
    Wanted,
    bytes_of,
    files_in,
    part_of_tensors,
)

TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_METADATA = "__metadata__"


def matches(path: pathlib.Path) -> bool:
    """A .safetensors file, or a folder with some."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return bool(files_in(path, "*.safetensors"))


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """The file, or all of the folder."""
    files = [path] if path.is_file() else files_in(path, "*.safetensors")
    return Foreign(parts=tuple(part_of_tensors(file, open_tensors, wanted) for file in files))


def open_tensors(path: pathlib.Path) -> Mapping[str, np.ndarray | Unread]:
    """The tensors of a file by name, mapped; `Unread` where the type is none of `TYPES`.

    Raises:
      ValueError: the file is truncated, or its header is not sound.
    """
    data = bytes_of(path)
    length = int(data[:8].view("<u8")[0]) if len(data) >= 8 else len(data)
    if 8 + length > len(data):
        raise ValueError(f"{path} is not a sound safetensors file: its header is cut off")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop(_METADATA, None)
        return {
            name: _tensor(data[8 + length :], entry)
            if entry["dtype"] in TYPES
            else Unread(dtype=str(entry["dtype"]), shape=tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error


def _tensor(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = TYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"truncated: a tensor ends at byte {stop} of {len(data)}")
    if stop - start != size:
        raise ValueError(f"a tensor of shape {shape} has {stop - start} bytes, not {size}")
    return data[start:stop].view(dtype).reshape(shape)
