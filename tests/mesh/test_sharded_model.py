"""A model on a mesh encodes and decodes as the same model on one device does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig

D, L = 12, 64


class Float64Config(SAEConfig):
    """Computed in float64, so that rounding hides nothing."""

    def dtype_on(self, platform):
        return jnp.dtype("float64")


def models(shape, k, seed=0, tied=False, config=SAEConfig, **options):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(L, D)).astype(np.float32)
    if tied:
        w[L // 2 :] = w[: L // 2]  # every latent has a twin on another shard
    params = {
        "w_enc": jnp.asarray(w),
        "w_dec": jnp.asarray(rng.normal(size=(L, D)), jnp.float32),
        "latent_bias": jnp.zeros(L) if tied else jnp.asarray(0.1 * rng.normal(size=L), jnp.float32),
        "pre_bias": jnp.asarray(rng.normal(size=D), jnp.float32),
    }
    config, normalizer = config(d_model=D, n_latents=L, k=k, **options), Normalizer()
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(*shape))
    split = jax.device_put(params, mesh_lib.tree_shardings(mesh, params))
    return SAE(config, params, normalizer), SAE(config, split, normalizer, mesh)


# k: one, fewer than a shard's latents, and more; equal pre-activations on two shards.
@pytest.mark.parametrize(
    "shape, k, tied",
    [((1, 8), 1, False), ((1, 8), 6, True), ((2, 4), 16, False), ((2, 4), 40, True)],
)
def test_the_same_code_and_reconstruction(shape, k, tied):
    whole, split = models(shape, k, tied=tied)
    assert split.mesh is not None and whole.mesh is None
    x = np.random.default_rng(1).normal(size=(3, 7, D)).astype(np.float32)  # 21 rows: padded
    encode, decode = jax.jit(lambda s, x: s.encode(x)), jax.jit(lambda s, z: s.decode(z))
    want, got = encode(whole, x), encode(split, x)
    np.testing.assert_array_equal(got.indices, want.indices)
    for field in dataclasses.fields(want):
        np.testing.assert_allclose(
            getattr(got, field.name), getattr(want, field.name), rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(decode(split, got), decode(whole, want), rtol=1e-4, atol=1e-5)


def test_no_device_holds_all_latents():
    _, split = models((1, 8), 4)
    text = (
        jax.jit(lambda s, x: s(x)).lower(split, np.zeros((16, D), np.float32)).compile().as_text()
    )
    assert f"f32[{L // 8},{D}]" in text
    assert f"f32[{L},{D}]" not in text and f"f32[16,{L}]" not in text


def test_one_latent_shard_needs_no_mesh():
    _, split = models((8, 1), 4)
    assert split.mesh is None


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
def test_gradients_pass_through(shape):
    """Attribution differentiates with respect to activations and latents."""
    with jax.enable_x64(True):
        whole, split = models(shape, 6, config=Float64Config)
        x = jnp.asarray(np.random.default_rng(2).normal(size=(16, D)))
        gradient = jax.jit(jax.grad(lambda x, model: jnp.sum(jnp.sin(model(x)))))
        want, got = gradient(x, whole), gradient(x, split)
        assert want.dtype == jnp.float64 and np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_no_rows():
    _, split = models((1, 8), 6)
    latents = split.encode(np.zeros((0, 3, D), np.float32))
    assert latents.values.shape == (0, 3, 6)
    assert split.decode(latents).shape == (0, 3, D)
