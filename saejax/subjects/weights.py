"""Tensors of a Hugging Face folder: opened lazily, checked, and placed where they are to live.

A parameter is read slice by slice from a memory map, straight into the shards of the devices that
hold it: of a mesh of several processes, each reads what its own devices hold. Loading needs no host
memory beyond these shards of one parameter.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from saejax.mesh import subject_sharding
from saejax.subjects.decoder import Config, Params, leaf_shapes
from saejax.subjects.layout import Family, build_tree, check_copy, check_tensors, heads_beside

DTYPES = ("float32", "bfloat16")
_STORED = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
      file: the safetensors file.
      kind: type in the format's words, as 'BF16'.
      shape: its shape.
      offset: first byte in the file.
      version: of the file, as `_version` has it.
    """

    file: pathlib.Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    version: tuple[int, int]

    def open(self) -> np.ndarray:
        """A read-only memory map of the tensor.

        Raises:
          FileNotFoundError: the file is gone.
          ValueError: it was replaced since its header was read.
        """
        if _version(self.file) != self.version:
            raise ValueError(
                f"{self.file} was changed while it was in use; start again, with the weights that "
                "the run began with"
            )
        dtype = _STORED[self.kind]
        bytes_map = np.memmap(
            self.file, np.uint8, "r", self.offset, (math.prod(self.shape) * dtype.itemsize,)
        )
        return np.asarray(bytes_map).view(dtype).reshape(self.shape)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: a subject folder has config.json, *.safetensors, tokenizer.json"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON text: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return content


def open_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """All tensors of model.safetensors, or of the shards that its index names.

    Raises:
      FileNotFoundError: there is neither, or a shard is missing.
      PermissionError: a file may not be read.
      ValueError: a file is damaged, or the index names a tensor that its shard lacks.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return _open_file(folder / "model.safetensors")
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json; convert "
            "other formats with save_pretrained(..., safe_serialization=True)"
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise ValueError(f"{index} must have an object weight_map, of tensor names to files")
    tensors: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if "/" in file or "\\" in file or not (folder / file).is_file():
            raise FileNotFoundError(f"{index} names the shard {file!r}, which is not in {folder}")
        there = _open_file(folder / file)
        wanted = [name for name, place in places.items() if place == file]
        if missing := [name for name in wanted if name not in there]:
            raise ValueError(
                f"{folder / file} has no tensor {', '.join(missing[:8])}, which {index.name} "
                f"places there; the download is incomplete or of mixed revisions"
            )
        tensors |= {name: there[name] for name in wanted}
    return tensors


def load_params(
    tensors: Mapping[str, Stored],
    family: Family,
    cfg: Config,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> Params:
    """The parameter tree.

    Args:
      tensors: of the folder.
      family: which knows the names.
      cfg: the model.
      dtype: type of every parameter, one of `DTYPES`.
      mesh: to split the parameters over; on the host, as numpy arrays, by default.

    Raises:
      ValueError: tensors that do not fit the model, or are of a type that is not supported; a
        tied head that is not the embedding.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} of a subject's weights: {' or '.join(DTYPES)}")
    places = check_tensors(family, cfg, {name: t.shape for name, t in tensors.items()})
    kinds = {name: tensors[name].kind for name in places.values()}
    odd = sorted(f"{name} is {kind}" for name, kind in kinds.items() if kind not in _STORED)
    if odd:
        raise ValueError(
            f"quantised weights are not supported: {', '.join(odd[:8])}"
            f"{' ...' if len(odd) > 8 else ''}; allowed: {', '.join(_STORED)}"
        )
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    leaves: dict[tuple, Any] = {}
    shapes = leaf_shapes(cfg)
    for path, piece in family.pieces(cfg).items():
        stored = tensors[places[piece.tensor]].open()
        beside = heads_beside(cfg, path, places, piece.tensor)
        heads = {f"{name} in {tensors[name].file}": tensors[name].open() for name in beside}
        once: dict[str, np.ndarray] = {}  # several devices may hold the same slice

        def read(
            index: tuple[slice, ...], piece=piece, stored=stored, heads=heads, once=once
        ) -> np.ndarray:
            if str(index) not in once:
                value = piece.read(stored, index)
                for name, head in heads.items():
                    check_copy(name, piece.read(head, index), value)
                once[str(index)] = np.array(value, dtype=target, order="C")
            return once[str(index)]

        if mesh is None:
            leaves[path] = read(tuple(slice(0, size) for size in shapes[path]))
        else:
            sharding = subject_sharding(mesh, path, shapes[path])
            leaves[path] = jax.make_array_from_callback(shapes[path], sharding, read)
    return build_tree(leaves)


def place(params: Params, mesh: Mesh, read: Callable[[Mesh], Params] | None = None) -> Params:
    """The same parameters split over a mesh.

    A shard that one of this process's devices holds already stays as it is; one that another of
    them holds is copied from there. No process asks another one for anything.

    Args:
      params: numpy arrays, or arrays on any devices; or none at all, to have them read.
      mesh: where they are wanted.
      read: reads them anew onto a mesh, where this process does not hold all that it needs.

    Raises:
      ValueError: it does not, and there is no `read`.
    """
    if not params and read is not None:
        return read(mesh)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    placed = []
    for path, leaf in leaves:
        keys = tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)
        found = _put(leaf, subject_sharding(mesh, keys, leaf.shape))
        if found is None:
            if read is None:
                raise ValueError(
                    "this process holds only a part of the subject's weights, and they are of no "
                    "folder that they could be read from once more; load the subject on this mesh"
                )
            del placed  # before the same is read
            return read(mesh)
        placed.append(found)
    return jax.tree_util.tree_unflatten(tree, placed)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array | None:
    """One array in another place; None if this process does not hold what it needs of it."""
    if not isinstance(leaf, jax.Array):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf
    held: dict[str, dict[jax.Device, jax.Array]] = {}
    for shard in leaf.addressable_shards:
        held.setdefault(_bounds(shard.index, leaf.shape), {})[shard.device] = shard.data
    wanted = sharding.addressable_devices_indices_map(leaf.shape)
    sources = {device: held.get(_bounds(at, leaf.shape)) for device, at in wanted.items()}
    if all(sources.values()):
        shards = [
            found[device] if device in found else jax.device_put(next(iter(found.values())), device)
            for device, found in sources.items()
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)
    if not leaf.is_fully_addressable:
        return None
    whole = to_host(leaf)  # cut otherwise: one parameter at a time
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """What a slice of an array takes, however it is written."""
    return str([part.indices(size) for part, size in zip(index, shape, strict=True)])


def to_host(leaf: Any) -> np.ndarray:
    """A parameter as numpy array, of which the parameter keeps no copy.

    Of one that is split over several processes they must all ask at once.
    """
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)
    # An array keeps the host copy it once made: let a stand-in of the same buffers keep it.
    if leaf.is_fully_replicated:
        one = leaf.addressable_shards[0]
        return np.asarray(
            jax.make_array_from_single_device_arrays(
                leaf.shape, SingleDeviceSharding(one.device), [one.data]
            )
        )
    shards = [shard.data for shard in leaf.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards))


def write_file(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, replaced in one move."""
    from safetensors.numpy import save_file

    temporary = path.with_suffix(".tmp")
    save_file(dict(tensors), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)  # the library makes it private
    os.replace(temporary, path)


def _open_file(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one file; the library checks header, offsets and length first."""
    import safetensors

    version = _version(path)
    with open_bytes(path) as file:  # first: the library calls a file missing that it may not read
        try:
            with safetensors.safe_open(path, framework="np"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a sound safetensors file ({error}); download it again"
            ) from error
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, _MAX_HEADER)))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, t["dtype"], tuple(t["shape"]), 8 + size + t["data_offsets"][0], version)
        for name, t in header.items()
    }


def open_bytes(path: pathlib.Path) -> BinaryIO:
    """A file opened for reading; PermissionError says what to do."""
    try:
        return open(path, "rb")
    except PermissionError as error:
        raise PermissionError(
            f"{path} cannot be read ({error.strerror}): give yourself permission, as with chmod u+r"
        ) from error


def _version(path: pathlib.Path) -> tuple[int, int]:
    """Length and time of the last change of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
