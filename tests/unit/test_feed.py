"""Rows find their devices, whatever the order of devices in the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saejax import mesh as mesh_lib
from saejax.data.feed import Feed, check_ranges, merged, take
from saejax.mesh import MeshShape, make_mesh

ROWS = np.arange(48, dtype=np.float32).reshape(16, 3)


def shuffled_mesh(shape: MeshShape) -> Mesh:
    """A mesh whose device order has nothing to do with their numbers."""
    order = np.random.default_rng(3).permutation(shape.size)
    return Mesh(np.array(jax.devices())[order].reshape(shape), ("data", "latent"))


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("mesh", [lambda shape: make_mesh(shape), shuffled_mesh])
def test_a_placed_batch_is_the_batch(shape, mesh):
    sharding = mesh_lib.token_sharding(mesh(MeshShape(*shape)))
    feed = Feed(sharding, 16)
    assert feed.ranges == ((0, 16),), "one process holds every row"
    placed = feed.place(ROWS)
    assert placed.sharding == sharding and placed.shape == (16, 3)
    np.testing.assert_array_equal(placed, ROWS)
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, ROWS[shard.index])
    np.testing.assert_array_equal(feed.place(ROWS.astype("bfloat16")).astype("float32"), ROWS)


class OfAnother:
    """A sharding of which other processes hold some devices."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        held = self.sharding.addressable_devices_indices_map(shape)
        return {device: index for device, index in held.items() if device in self.devices}


@pytest.mark.parametrize("mine", [[0], [2, 3], [1, 2, 6], [0, 7], list(range(8))])
def test_a_process_is_told_the_rows_of_its_devices_and_puts_them_there(mine, monkeypatch):
    sharding = mesh_lib.token_sharding(shuffled_mesh(MeshShape(2, 4)))
    devices = [jax.devices()[i] for i in mine]
    feed = Feed(OfAnother(sharding, devices), 16)
    held = sharding.addressable_devices_indices_map((16, 3))
    rows = sorted(r for d in devices for r in range(*held[d][0].indices(16)))
    assert [r for a, b in feed.ranges for r in range(a, b)] == rows
    assert all(b < c for (_, b), (c, _) in zip(feed.ranges, feed.ranges[1:]))
    made = []
    monkeypatch.setattr(
        jax, "make_array_from_single_device_arrays", lambda *args: made.append(args)
    )
    feed.place(take(ROWS, feed.ranges))
    ((shape, _, parts),) = made
    assert shape == (16, 3) and [part.device for part in parts] == [d for d in held if d in devices]
    for part in parts:
        np.testing.assert_array_equal(part, ROWS[held[part.device][0]])


def test_a_batch_that_is_in_its_place_stays_there():
    """However its sharding is written: among several processes nothing else can be done with it."""
    mesh = make_mesh(MeshShape(2, 4))
    sharding = mesh_lib.token_sharding(mesh)
    written = NamedSharding(mesh, PartitionSpec(*sharding.spec, *(2 - len(sharding.spec)) * [None]))
    for same in (sharding, written):
        batch = jax.device_put(ROWS, same)
        assert Feed(sharding, 16).place(batch) is batch
    elsewhere = jax.device_put(ROWS, NamedSharding(mesh, PartitionSpec()))
    assert Feed(sharding, 16).place(elsewhere).sharding.is_equivalent_to(sharding, 2)


def test_rows_of_another_count_are_refused():
    feed = Feed(mesh_lib.token_sharding(make_mesh(MeshShape(1, 2))), 16)
    with pytest.raises(ValueError, match=r"15 rows were given .* this process holds 16"):
        feed.place(ROWS[:15])


def test_ranges():
    assert merged([(4, 6), (0, 2), (2, 4), (8, 9)]) == ((0, 6), (8, 9))
    assert check_ranges(None, 5) == ((0, 5),)
    assert check_ranges(((0, 2), (2, 5)), 5) == ((0, 2), (2, 5))
    assert np.shares_memory(take(ROWS, ((2, 5),)), ROWS)
