"""Proof that what is read is what was written: digests of arrays, of files, and sealed JSON.

Digests of arrays tell of everything between the device that wrote and the device that reads;
checksums of files tell which file was damaged, before anything of it is used.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from saejax import mesh as mesh_lib

_AXIS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0x2545F491)
_SEAL = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "content":\n')
_PIECE = 1 << 22


class DamageError(OSError):
    """A file or array is not what was written; the message names it."""


def array_digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """64 bits of each array, in one program, the same for any sharding, mesh or device count.

    Two sums, modulo 2^32, of a hash of each element's bits and index. Integer sums do not depend on
    their order; the hash is a bijection of the bits, so that a change of a single element shows for
    certain. Other changes are missed once in 2^64. (A product of bits and index would not do: two
    signs that flip cancel in it, whatever the factors.)

    Args:
      arrays: of up to six axes, on one mesh, or on one device; of any dtype of 1, 2 or 4 bytes.

    Returns:
      16 hexadecimal digits for each name.
    """
    meshes = {x.sharding.mesh for x in arrays.values() if isinstance(x.sharding, NamedSharding)}
    sums = _program(meshes.pop() if len(meshes) == 1 else None)(list(arrays.values()))
    words = [f"{int(word):08x}" for word in jax.device_get(sums)]
    return {name: words[2 * i] + words[2 * i + 1] for i, name in enumerate(arrays)}


@functools.lru_cache(maxsize=8)
def _program(mesh: Mesh | None):
    def sums(arrays):
        return [word for x in arrays for word in _sums(x)]

    if mesh is None:
        return jax.jit(sums)

    def replicated(arrays):
        words = jax.eval_shape(sums, arrays)
        return jax.lax.with_sharding_constraint(sums(arrays), mesh_lib.tree_shardings(mesh, words))

    return jax.jit(replicated)


def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    # A factor for each axis, so that no count of elements, however large, repeats the pattern.
    place = jnp.full(bits.shape, jnp.uint32(0x3C6EF372))
    for axis in range(bits.ndim):
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(_AXIS[axis])
    first = _mix(bits ^ _mix(place))
    second = _mix(first + jnp.uint32(0x9E3779B9))
    return tuple(jnp.sum(hashed, dtype=jnp.uint32) for hashed in (first, second))


def _mix(h: jax.Array) -> jax.Array:
    # The finalizer of MurmurHash3: a bijection whose every output bit depends on every input bit.
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def list_files(folder: pathlib.Path) -> list[str]:
    """Names of all files under a folder, relative to it, in order of size and name.

    A folder that is not there has none. One that cannot be listed is an OSError: its files are not
    known to be missing.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    found = []
    for base, _, names in os.walk(folder, onerror=refuse):
        found += [pathlib.Path(base, name) for name in names]
    found.sort(key=lambda path: (-path.stat().st_size, path.as_posix()))
    return [path.relative_to(folder).as_posix() for path in found]


def file_sums(folder: pathlib.Path, names: Iterable[str]) -> dict[str, list]:
    """Size and CRC-32 of files, by name, each one flushed to its disk.

    CRC-32 shows any change within four neighbouring bytes for certain, and costs a quarter of a
    second for a gigabyte.
    """
    return {name: _sum_of(folder / name, flush=True) for name in names}


def _sum_of(path: pathlib.Path, *, flush: bool = False) -> list:
    size, crc = 0, 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
        if flush:
            os.fsync(file.fileno())
    return [size, f"{crc:08x}"]


def check_listing(folder: pathlib.Path, files: Mapping[str, list]) -> None:
    """Raises DamageError unless exactly these files lie in a folder."""
    present = set(list_files(folder))
    for name in sorted(files.keys() - present):
        raise DamageError(f"{folder / name} is missing")
    for name in sorted(present - files.keys()):
        raise DamageError(f"{folder / name} does not belong there")


def check_files(folder: pathlib.Path, files: Mapping[str, list], names: Iterable[str]) -> None:
    """Reads files and compares size and CRC-32 with `files`.

    Raises:
      DamageError: naming the first file that differs or is missing.
      OSError: one cannot be read, for now or by this user, which is no damage.
    """
    for name in names:
        path = folder / name
        try:
            found = _sum_of(path)
        except FileNotFoundError as error:
            raise DamageError(f"{path} is missing") from error
        size, crc = files[name]
        if found[0] != size:
            raise DamageError(f"{path} has {found[0]} bytes, but {size} were written")
        if found[1] != crc:
            raise DamageError(f"{path} has CRC-32 {found[1]}, but {crc} was written")


def write_sealed(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON that carries the SHA-256 of its own bytes, flushed to its disk."""
    text = json.dumps(content, indent=1).encode() + b"}\n"
    seal = hashlib.sha256(text).hexdigest()
    with path.open("wb") as file:
        file.write(b'{"sha256": "%s", "content":\n%s' % (seal.encode(), text))
        file.flush()
        os.fsync(file.fileno())


def read_sealed(path: pathlib.Path) -> dict[str, Any]:
    """What `write_sealed` wrote, to the last byte.

    Raises:
      DamageError: the file is missing, or differs in any byte.
      OSError: it cannot be read, for now or by this user.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamageError(f"{path} is missing, or no file") from error
    seal = _SEAL.match(data)
    if seal is None or hashlib.sha256(data[seal.end() :]).hexdigest() != seal[1].decode():
        raise DamageError(f"{path} is not what was written: its SHA-256 does not fit")
    return json.loads(data)["content"]


def flush_folder(path: pathlib.Path) -> None:
    """Makes renames in a folder last through a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(leaf: Any) -> str:
    """`float32[16, 8]`, or `absent` for None."""
    return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
