"""Digests: the same for any layout, another for any change."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from saejax import digests
from saejax import mesh as mesh_lib
from saejax.digests import DamageError
from saejax.mesh import MeshShape

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(16, 24)).astype(np.float32)


def digest(x) -> str:
    return digests.array_digests({"x": jnp.asarray(x)})["x"]


def reference(x: np.ndarray) -> str:
    """The definition, element by element, in Python's whole numbers."""

    def mix(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    factors = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
    bits = x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    sums = [0, 0]
    for index in np.ndindex(x.shape):
        place = 0x3C6EF372 + sum(i * f for i, f in zip(index, factors))
        first = mix(int(bits[index]) ^ mix(place % 2**32))
        sums[0] += first
        sums[1] += mix((first + 0x9E3779B9) % 2**32)
    return "".join(f"{total % 2**32:08x}" for total in sums)


@pytest.mark.parametrize(
    "array",
    [
        WEIGHTS,
        WEIGHTS[0],
        np.int32(7),
        np.arange(-5, 5, dtype=np.int32),
        np.asarray(WEIGHTS, jnp.bfloat16),
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.float32([np.nan, -np.nan, np.inf, -0.0]),
    ],
)
def test_it_is_what_it_is_defined_to_be(array):
    assert digest(array) == reference(np.asarray(array))


def test_no_layout_changes_it():
    found = {digest(WEIGHTS)}
    for n in (1, 2, 4, 8):
        for shape in mesh_lib.shapes_of(n):
            mesh = mesh_lib.make_mesh(MeshShape(*shape))
            for spec in ((), ("data", "latent"), ("latent",), (None, ("data", "latent"))):
                sharding = NamedSharding(mesh, PartitionSpec(*spec))
                placed = jax.device_put(WEIGHTS, sharding)
                found.add(digests.array_digests({"x": placed})["x"])
    assert len(found) == 1


def test_every_single_bit_changes_it():
    program = jax.jit(lambda x: digests._sums(x))
    before = jax.device_get(program(WEIGHTS))
    bits = WEIGHTS.view(np.uint32)
    for element in RNG.choice(WEIGHTS.size, 40, replace=False):
        for bit in range(32):
            changed = bits.copy()
            changed.flat[element] ^= np.uint32(1 << bit)
            after = jax.device_get(program(changed.view(np.float32)))
            assert all(a != b for a, b in zip(before, after)), (element, bit)


def test_exchanged_or_moved_elements_change_it():
    swapped = WEIGHTS.copy()
    swapped[[3, 7]] = swapped[[7, 3]]
    found = [digest(x) for x in (WEIGHTS, swapped, np.roll(WEIGHTS, 1), WEIGHTS[::-1], -WEIGHTS)]
    assert len(set(found)) == 5
    two_signs = WEIGHTS.copy()
    two_signs[[2, 5], 7] *= -1
    assert digest(two_signs) != digest(WEIGHTS)
    assert digest(np.zeros(4, np.float32)) != digest(np.float32([0, 0, 0, -0.0]))
    assert digest(WEIGHTS.T.copy()) != digest(WEIGHTS)


# --- Sealed JSON ----------------------------------------------------------------------------------


def test_a_sealed_file_is_json_that_carries_its_own_sum(tmp_path):
    path = tmp_path / "x.json"
    content = {"a": [1, 2.5, None, "ü"], "b": {}}
    digests.write_sealed(path, content)
    assert digests.read_sealed(path) == content
    whole = json.loads(path.read_text())
    assert whole["content"] == content
    body = path.read_bytes().split(b"\n", 1)[1]
    assert whole["sha256"] == hashlib.sha256(body).hexdigest()


def test_every_flipped_bit_and_every_cut_of_a_sealed_file_is_found(tmp_path):
    path = tmp_path / "x.json"
    digests.write_sealed(path, {"a": 1, "b": [True]})
    data = path.read_bytes()
    for offset in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(DamageError, match=r"x\.json is not what was written"):
                digests.read_sealed(path)
        path.write_bytes(data[:offset])
        with pytest.raises(DamageError):
            digests.read_sealed(path)
    path.write_bytes(data + b" ")
    with pytest.raises(DamageError):
        digests.read_sealed(path)
    path.unlink()
    with pytest.raises(DamageError, match=r"x\.json is missing"):
        digests.read_sealed(path)
