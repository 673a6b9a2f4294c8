"""Every kind of input normalisation: what it maps to, and that it is undone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.model.normalizer import KINDS, Normalizer, measure


def rows(shape=(5, 16), seed=0, dtype=np.float32):
    return (3 + 2 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def make(kind):
    return measure(kind, rows(seed=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16)])
def test_undo_returns_the_input(kind, shape):
    x = rows(shape)
    x_n, offset, scale = make(kind).apply(jnp.asarray(x))
    assert x_n.shape == shape
    assert offset.shape == scale.shape == (*shape[:-1], 1)
    # Layer norm adds an epsilon on the way in and not on the way out, as released.
    np.testing.assert_allclose(make(kind).undo(x_n, offset, scale), x, rtol=1e-4)


def test_unit():
    x = rows()
    x_n, offset, scale = Normalizer(kind="unit").apply(jnp.asarray(x))
    np.testing.assert_allclose(x_n.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(x_n, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(offset[:, 0], x.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(scale[:, 0], x.std(-1) * 4, rtol=1e-5)


def test_layer_norm_is_the_released_formula():
    with jax.enable_x64(True):
        x = rows(dtype=np.float64) * 1e-3  # small, so that the epsilon shows
        x_n, offset, scale = Normalizer(kind="layer_norm").apply(jnp.asarray(x))
        mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
        np.testing.assert_allclose(x_n, (x - mean) / (std + 1e-5), rtol=1e-12)
        back = Normalizer(kind="layer_norm").undo(x_n, offset, scale)
        np.testing.assert_allclose(back, x_n * std + mean, rtol=1e-12)
        assert np.abs(back - x).max() > 1e-6, "the asymmetry of the released models is kept"


def test_layer_norm_has_norm_of_sqrt_d_minus_1():
    x_n, _, _ = Normalizer(kind="layer_norm").apply(jnp.asarray(rows((3, 768))))
    np.testing.assert_allclose(np.linalg.norm(x_n, axis=-1), np.sqrt(767), rtol=1e-4)


def test_scalar_is_measured():
    sample = rows((100, 16), seed=2)
    normalizer = measure("scalar", sample)
    assert normalizer.scale == pytest.approx(np.sqrt((sample.astype(float) ** 2).sum(-1).mean()))
    x_n, offset, scale = normalizer.apply(jnp.asarray(sample))
    np.testing.assert_allclose((np.asarray(x_n) ** 2).sum(-1).mean(), 1, rtol=1e-5)
    assert not offset.any()
    np.testing.assert_allclose(scale, normalizer.scale, rtol=1e-6)


def test_none_changes_nothing():
    x = rows()
    x_n, offset, scale = Normalizer(kind="none").apply(jnp.asarray(x))
    np.testing.assert_array_equal(x_n, x)
    assert (np.asarray(offset) == 0).all()
    assert (np.asarray(scale) == 1).all()


@pytest.mark.parametrize("kind", ["unit", "layer_norm", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.3, 1000.1])
def test_constant_vectors_have_nothing_to_explain(kind, value):
    x = jnp.full((2, 768), value, jnp.float32)
    x_n, offset, scale = Normalizer(kind=kind).apply(x)
    assert np.isfinite(x_n).all()
    if kind == "unit":
        assert np.abs(x_n).max() == 0, "the rounding of the mean is no direction"
    np.testing.assert_allclose(Normalizer(kind=kind).undo(x_n, offset, scale), x, rtol=1e-5)


@pytest.mark.parametrize("kind", ["unit", "layer_norm"])
def test_small_and_large_vectors_are_not_taken_for_constant(kind):
    x = rows() - 3
    want, _, _ = Normalizer(kind="unit").apply(jnp.asarray(x))
    for factor in (1e-3, 1e4):
        x_n, _, _ = Normalizer(kind=kind).apply(jnp.asarray(x * factor + 5 * factor))
        direction = x_n / np.linalg.norm(x_n, axis=-1, keepdims=True)
        np.testing.assert_allclose(direction, want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_finite_even_of_a_constant_vector(kind):
    normalizer, weight = make(kind), jnp.arange(8.0)

    def f(x):
        return (normalizer.apply(x)[0] * weight).sum()

    for x in (jnp.ones(8), jnp.zeros(8), jnp.arange(8.0) ** 2):
        assert np.isfinite(jax.grad(f)(x)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind):
    x = rows()
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert all(a.dtype == jnp.float32 for a in make(kind).apply(jnp.asarray(x, dtype)))
    with jax.enable_x64(True):
        outputs = make(kind).apply(jnp.asarray(x, jnp.float64))
        assert all(a.dtype == jnp.float64 for a in outputs)
        np.testing.assert_allclose(make(kind).undo(*outputs), x, rtol=1e-4)


def test_nan_stays_where_it_is():
    x = rows()
    x[1, 3] = np.nan
    x_n, _, _ = Normalizer().apply(jnp.asarray(x))
    assert np.isnan(x_n[1]).all()
    assert not np.isnan(np.delete(x_n, 1, 0)).any()


def test_bad_settings():
    with pytest.raises(ValueError, match=r"normalization = 'batch' must be one of"):
        Normalizer(kind="batch")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"scale = .* must be positive"):
            Normalizer(kind="scalar", scale=scale)
    with pytest.raises(ValueError, match="scale"):
        measure("scalar", np.zeros((4, 3)))
