"""The explicit collectives: exact global selection, tokens to and fro."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import collectives
from saejax import mesh as mesh_lib

MESHES = [(1, 8), (2, 4)]


def on_mesh(mesh_shape, fn, ins, outs):
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(*mesh_shape))
    return jax.jit(mesh_lib.per_device(fn, mesh, ins, outs))


def by_numpy(x, k):
    """Bool mask of the k largest per row, ties to the lowest index."""
    order = np.lexsort((np.broadcast_to(np.arange(x.shape[1]), x.shape), -x))[:, :k]
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


@functools.cache
def selector(mesh_shape, k, exchange):
    """Global selection among `x_LB` (one latent per row, so that the table's split applies)."""

    def fn(x_LB):
        x_BL = x_LB.T
        values, indices = collectives.top_k(x_BL, min(k, x_BL.shape[1]))
        count = collectives.count_kept(values, k, exchange)
        kept = jnp.arange(values.shape[1]) < count[:, None]
        rows = jnp.arange(len(x_BL))[:, None]
        return (jnp.zeros(x_BL.shape, bool).at[rows, indices].set(kept).T,)

    return on_mesh(mesh_shape, fn, ("w_enc",), ("w_enc",))


def kept_by_mesh(x, k, mesh_shape, exchange="all_to_all"):
    return np.asarray(selector(mesh_shape, k, exchange)(jnp.asarray(x.T))[0]).T


def rows(kind, n):
    rng = np.random.default_rng(7)
    b = 24
    x = {
        "random": lambda: rng.normal(size=(b, n)),
        "few levels": lambda: rng.integers(0, 3, size=(b, n)),
        "all equal": lambda: np.ones((b, n)),
        "best on the last shard": lambda: np.tile(np.arange(n), (b, 1)),
        "all negative infinity but two": lambda: np.where(
            np.isin(np.arange(n), (1, n - 2)), 1.0, np.full((b, n), -np.inf)
        ),
    }
    return x[kind]().astype(np.float32)


KINDS = [
    "random", "few levels", "all equal", "best on the last shard", "all negative infinity but two",
]  # fmt: skip


@pytest.mark.parametrize("mesh_shape", MESHES)
# (latents, k): fewer latents than k on each shard; k equal to a shard; k above; k = 1; k = all.
@pytest.mark.parametrize("n, k", [(32, 6), (64, 8), (64, 3), (32, 1), (16, 16), (16, 15)])
@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
def test_selection_equals_the_unsharded_one(n, k, mesh_shape, exchange):
    for kind in KINDS:
        x = rows(kind, n)
        kept = kept_by_mesh(x, k, mesh_shape, exchange)
        np.testing.assert_array_equal(kept, by_numpy(x, k), err_msg=kind)
        assert (kept.sum(1) == k).all(), kind


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_nan_of_either_sign_is_kept(mesh_shape):
    x = rows("random", 32)
    for row, bits in ((0, 0x7FC00000), (1, 0xFFC00000)):
        x[row, 29] = np.array([bits], np.uint32).view(np.float32)[0]
    kept = kept_by_mesh(x, 6, mesh_shape)
    assert kept[:2, 29].all()
    np.testing.assert_array_equal(kept[2:], by_numpy(x[2:], 6))


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_signed_zeros_tie_across_shards(mesh_shape):
    x = np.full((24, 32), -1, np.float32)
    x[:, [2, 30]] = [-0.0, 0.0]
    kept = kept_by_mesh(x, 1, mesh_shape)
    assert (kept.sum(1) == 1).all()
    assert kept[:, 2].all()


@pytest.mark.parametrize("exchange", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("shards, k, capacity", [(64, 32, 4), (512, 64, 3), (512, 8, 1)])
def test_many_shards(shards, k, capacity, exchange):
    """The same code under `vmap`, which gives it as many shards as one likes."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 400, size=(shards, 8 * shards)).astype(np.float32)  # ties on every row

    def fn(x_BL):
        values, _ = collectives.top_k(x_BL, capacity)
        return collectives.count_kept(values, k, exchange)

    by_shard = x.reshape(shards, shards, 8).transpose(1, 0, 2)  # [S, B, L]
    counts = jax.jit(jax.vmap(fn, axis_name=mesh_lib.LATENT))(by_shard)
    offered = np.sort(by_shard, axis=-1)[..., ::-1][..., :capacity]  # [S, B, C]
    kept = by_numpy(offered.transpose(1, 0, 2).reshape(shards, -1), k)
    np.testing.assert_array_equal(counts, kept.reshape(shards, shards, capacity).sum(-1).T)


def test_tokens_that_do_not_divide_by_the_shards_are_gathered():
    x = rows("few levels", 32)[:21]
    np.testing.assert_array_equal(kept_by_mesh(x, 6, (1, 8)), by_numpy(x, 6))


def test_a_capacity_keeps_the_best_of_what_is_offered():
    """With one candidate a shard, ties included, the kept set is the top k of the shard maxima."""
    capacity, k = 1, 3

    def fn(x_LB):
        values, _ = collectives.top_k(x_LB.T, capacity)
        return (collectives.count_kept(values, k)[None],)

    for kind in KINDS:
        x = rows(kind, 32)
        mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(1, 8))
        split = mesh_lib.P(mesh_lib.LATENT, None)
        counts = jax.jit(
            jax.shard_map(fn, mesh=mesh, in_specs=split, out_specs=(split,), check_vma=False)
        )(jnp.asarray(x.T))[0]
        maxima = x.reshape(len(x), 8, 4).max(2)
        np.testing.assert_array_equal(np.asarray(counts).T, by_numpy(maxima, k), err_msg=kind)


@pytest.mark.parametrize("mesh_shape", [(2, 4), (8, 1), (1, 8)])
def test_tokens_are_gathered_in_order(mesh_shape):
    x = jnp.arange(48.0).reshape(16, 3)
    shares = on_mesh(
        mesh_shape,
        lambda x: (collectives.reduce_over_data(collectives.gather_tokens(x, x.dtype)),),
        ("tokens",),
        ("replicated",),
    )
    want = np.asarray(x).reshape(mesh_shape[0], -1, 3).sum(0)
    np.testing.assert_array_equal(shares(x)[0], want)


@pytest.mark.parametrize("mesh_shape", [(2, 4), (1, 8)])
def test_the_sum_of_all_shards_comes_back_in_own_rows(mesh_shape):
    x = jnp.arange(48.0).reshape(16, 3)

    def fn(x_bD):
        shard = 1.0 + jax.lax.axis_index(mesh_lib.LATENT)
        return (collectives.sum_tokens(shard * collectives.gather_tokens(x_bD, x_bD.dtype)),)

    got = on_mesh(mesh_shape, fn, ("tokens",), ("tokens",))(x)[0]
    np.testing.assert_array_equal(got, x * sum(range(1, mesh_shape[1] + 1)))
