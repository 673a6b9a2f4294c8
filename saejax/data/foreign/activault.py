"""Folders of activault, one a hook: metadata.json and `.pt` files with `states` and `input_ids`.

activault has taken special tokens out of the contexts already.
"""

import pathlib

from saejax.data.foreign import torch_files
from saejax.data.foreign.interface import Foreign, Wanted, files_in, part_of_tensors, read_json

_METADATA = "metadata.json"


def matches(path: pathlib.Path) -> bool:
    """A folder of one hook."""
    return (path / _METADATA).is_file() and bool(files_in(path, "*.pt"))


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """All files of the folder, which must be as metadata.json says."""
    told = read_json(path / _METADATA)
    wanted = Wanted(field=wanted.field or "states", tokens=wanted.tokens)
    files = files_in(path, "*.pt")
    parts = [part_of_tensors(file, torch_files.open_tensors, wanted) for file in files]
    for part in parts:
        found = (part.shape[1], part.shape[2], f"torch.{part.dtype}")
        expected = (told.get("sequence_length"), told.get("d_in"), told.get("dtype"))
        if found != expected:
            raise ValueError(
                f"{part.path} has (sequence_length, d_in, dtype) = {found}, but {_METADATA} says "
                f"{expected}"
            )
    return Foreign(parts=tuple(parts), known={"site": path.resolve().name})
