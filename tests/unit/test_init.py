"""Initial parameters: directions, scale, and the geometric median."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.mesh import MeshShape, make_mesh
from saejax.model import sparse
from saejax.model.init import geometric_median, init_params, match_scale, unit_rows
from saejax.train.state import initial_pre_bias, total_variance

D, L, K = 32, 256, 8
PRE_BIAS = np.linspace(-1, 1, D).astype(np.float32)


@functools.cache
def jitted(scaled, mesh_shape, **options):
    def make(key):
        fresh = init_params(key, jnp.asarray(PRE_BIAS), L, **options)
        return match_scale(fresh, key, K, make_mesh(MeshShape(*mesh_shape))) if scaled else fresh

    return jax.jit(make)


def params(scaled=True, key=0, mesh_shape=(1, 1), **options):
    return jitted(scaled, mesh_shape, **options)(jax.random.key(key))


@jax.jit
def reconstruction_norms(p):
    """Of fresh unit vectors about pre_bias."""
    x = unit_rows(jax.random.normal(jax.random.key(99), (512, D))) + p["pre_bias"][None, :]
    values, indices = sparse.encode_top_k(
        x, p["w_enc"], p["latent_bias"], p["pre_bias"], K, jnp.dtype("float32")
    )
    out = sparse.decode(jax.nn.relu(values), indices, p["w_dec"], jnp.dtype("float32"))
    return jnp.linalg.norm(out, axis=-1)


def test_decoder_rows_are_unit_and_the_encoder_parallel():
    p = params()
    np.testing.assert_allclose(np.linalg.norm(p["w_dec"], axis=1), 1, rtol=1e-5)
    ratio = np.linalg.norm(p["w_enc"], axis=1)
    assert np.ptp(ratio) < 1e-5 * ratio[0], "one scale for all latents"
    np.testing.assert_allclose(p["w_enc"], p["w_dec"] * ratio[0], atol=1e-6)
    assert p["w_enc"] is not p["w_dec"]
    np.testing.assert_array_equal(p["pre_bias"], PRE_BIAS)
    assert not p["latent_bias"].any()
    assert {array.dtype for array in p.values()} == {jnp.dtype("float32")}
    assert p["w_enc"].shape == p["w_dec"].shape == (L, D)


def test_directions_are_uniform():
    w = np.asarray(params()["w_dec"])
    assert np.abs(w.mean(0)).max() < 5 / np.sqrt(L * D)
    cosines = (w @ w.T)[~np.eye(L, dtype=bool)]
    assert np.std(cosines) == pytest.approx(1 / np.sqrt(D), rel=0.05)


@pytest.mark.parametrize("parallel", [True, False])
def test_reconstructions_start_with_the_norm_of_their_input(parallel):
    matched = reconstruction_norms(params(parallel=parallel)).mean()
    unmatched = reconstruction_norms(params(scaled=False, parallel=parallel)).mean()
    assert matched == pytest.approx(1, rel=0.04)
    assert abs(unmatched - 1) > 0.07, "the test must see a wrong scale"


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)])
def test_the_scale_is_the_same_on_every_mesh(mesh_shape):
    np.testing.assert_allclose(params(mesh_shape=mesh_shape)["w_enc"], params()["w_enc"], rtol=1e-5)


def test_independent_encoder():
    p = params(parallel=False)
    cosine = (unit_rows(p["w_enc"]) * p["w_dec"]).sum(1)
    assert np.abs(cosine).max() < 0.95
    assert abs(float(cosine.mean())) < 0.1
    np.testing.assert_allclose(p["w_dec"], params()["w_dec"], rtol=1e-6)


def test_without_matching_the_encoder_has_unit_rows():
    p = params(scaled=False)
    np.testing.assert_allclose(p["w_enc"], p["w_dec"], rtol=1e-6)


def test_seeds_differ():
    other = params(key=1)
    assert np.abs(other["w_dec"] - params()["w_dec"]).max() > 0.1


def distance_sum(point, rows):
    return np.linalg.norm(rows - point, axis=-1).sum()


def test_geometric_median_by_brute_force():
    rows = np.random.default_rng(0).normal(size=(31, 2)) * [1, 3] + [5, -2]
    centre, width = rows.mean(0), 4.0
    for _ in range(12):  # a grid that closes in on the least sum of distances
        axis = np.linspace(-width, width, 21)
        grid = centre + np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
        sums = np.linalg.norm(rows[None] - grid[:, None], axis=-1).sum(1)
        centre, width = grid[sums.argmin()], width / 4
    np.testing.assert_allclose(geometric_median(rows), centre, atol=1e-4)


def test_geometric_median_ignores_outliers():
    rng = np.random.default_rng(0)
    rows = 0.1 * rng.normal(size=(500, 8)) + 2
    rows[:50] = 1000
    median = geometric_median(rows)
    assert np.abs(median - 2).max() < 0.1
    assert rows.mean(0).min() > 50
    assert median.dtype == np.float64


def test_geometric_median_of_symmetric_and_single_rows():
    square = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) + 3
    np.testing.assert_allclose(geometric_median(square), [3, 3], atol=1e-6)
    np.testing.assert_allclose(geometric_median(np.full((5, 3), 7.0)), 7)
    # On a line it is the median, and a row of the sample.
    line = np.zeros((5, 2))
    line[:, 0] = [0, 1, 2, 50, 90]
    np.testing.assert_allclose(geometric_median(line), [2, 0], atol=1e-3)


def test_geometric_median_leaves_a_row_that_is_the_mean():
    rows = np.array([[0.0, 0], [1, 0], [1, 0], [1, 0], [-3, 0]])
    assert not rows.mean(0).any(), "the iteration starts on the first row"
    assert distance_sum(geometric_median(rows), rows) < 5 + 1e-3


def test_choices_of_pre_bias():
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert not initial_pre_bias("zeros", rows).any()
    np.testing.assert_allclose(initial_pre_bias("mean", rows), rows.mean(0), rtol=1e-4)
    np.testing.assert_array_equal(
        initial_pre_bias("geometric_median", rows), geometric_median(rows)
    )


def test_variance_is_about_the_mean():
    rows = np.random.default_rng(0).normal(size=(50, 4)) + 100
    assert total_variance(rows) == pytest.approx(rows.var(0).sum())
    with pytest.raises(ValueError, match="3 activations has total variance 0"):
        total_variance(np.ones((3, 4)))
