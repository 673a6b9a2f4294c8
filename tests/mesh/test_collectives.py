"""The explicit collectives: exact global selection, and the gradients each one stands for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import collectives
from saejax import mesh as mesh_lib

MESHES = [(1, 8), (2, 4)]


def on_mesh(mesh_shape, fn, ins, outs):
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=mesh_shape[0], latent=mesh_shape[1]))
    return jax.jit(mesh_lib.per_device(fn, mesh, ins, outs))


def by_numpy(x, k):
    """Bool mask of the k largest per row, ties to the lowest index."""
    order = np.lexsort((np.broadcast_to(np.arange(x.shape[1]), x.shape), -x))[:, :k]
    mask = np.zeros(x.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


@functools.cache
def selector(mesh_shape, k):
    """Global selection among `x_LB` (one latent per row, so that the table's split applies)."""

    def fn(x_LB):
        x_BL = x_LB.T
        values, indices = collectives.top_k(x_BL, min(k, x_BL.shape[1]))
        kept = collectives.keep_global_top_k(values, k)
        rows = jnp.arange(len(x_BL))[:, None]
        return (jnp.zeros(x_BL.shape, bool).at[rows, indices].set(kept).T,)

    return on_mesh(mesh_shape, fn, ("w_enc",), ("w_enc",))


def kept_by_mesh(x, k, mesh_shape):
    return np.asarray(selector(mesh_shape, k)(jnp.asarray(x.T))[0]).T


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
def test_selection_equals_the_unsharded_one(n, k, mesh_shape):
    for kind in KINDS:
        x = rows(kind, n)
        kept = kept_by_mesh(x, k, mesh_shape)
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


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_gradients_of_sum_and_share(mesh_shape):
    """y = sum_l f_l(shared): the value is computed whole on every shard, once for the gradient."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
    shared = jnp.asarray(rng.normal(size=5), jnp.float32)

    def dense(w, shared):
        return jnp.sin((jnp.tanh(w @ shared)[:, None] * w).sum(0)).sum()

    def local(params):
        def loss(params):
            p = collectives.share_over_latents(params["pre_bias"])
            w = params["w_enc"]
            partial = (jnp.tanh(w @ p)[:, None] * w).sum(0)
            return jnp.sin(collectives.sum_over_latents(partial)).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        return gradient, value

    params = {"w_enc": w, "pre_bias": shared}
    gradient, value = on_mesh(mesh_shape, local, (params,), (params, "replicated"))(params)
    want_w, want_shared = jax.grad(dense, (0, 1))(w, shared)
    np.testing.assert_allclose(value, dense(w, shared), rtol=1e-5)
    np.testing.assert_allclose(gradient["w_enc"], want_w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient["pre_bias"], want_shared, rtol=1e-4, atol=1e-5)
    # The same on every device, not only on the first.
    for shard in gradient["pre_bias"].addressable_shards:
        np.testing.assert_array_equal(shard.data, gradient["pre_bias"])


@pytest.mark.parametrize("mesh_shape", [(2, 4), (8, 1), (1, 8)])
def test_tokens_are_gathered_in_order(mesh_shape):
    x = jnp.arange(48.0).reshape(16, 3)
    shares = on_mesh(
        mesh_shape,
        lambda x: (collectives.reduce_over_data(collectives.gather_tokens(x)),),
        ("tokens",),
        ("replicated",),
    )
    want = np.asarray(x).reshape(mesh_shape[0], -1, 3).sum(0)
    np.testing.assert_array_equal(shares(x)[0], want)
