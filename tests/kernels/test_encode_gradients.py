"""Gradients of the encoder and of its selection against float64 numpy, on every kind of input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

TOKENS, WIDTH, N = 6, 8, 40
KINDS = ["random", "whole numbers", "all negative", "all equal", "masked"]
WITH_NAN = ["nan in x", "nan in w", "nan in b"]


def problem(kind):
    rng = np.random.default_rng(1)
    x, w, b = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(N, WIDTH)), rng.normal(size=N)
    if kind == "whole numbers":  # sums of them are exact, so that ties are ties
        x, w, b = (rng.integers(-2, 3, a.shape).astype(float) for a in (x, w, b))
    if kind == "all negative":
        x, w, b = np.abs(x), -np.abs(w), -np.abs(b)
    if kind == "all equal":
        x, w, b = np.ones_like(x), np.ones_like(w), np.zeros_like(b)
    if kind == "masked":
        b[rng.random(N) < 0.5] = -np.inf
    if kind in WITH_NAN:
        {"x": x, "w": w, "b": b}[kind[-1]].reshape(-1)[3] = np.nan
    return [a.astype(np.float32) for a in (x, w, b)], rng


def by_numpy(x, w, b, k, cotangents):
    """Values of the k largest, NaN above all and ties to the lowest, and gradients of these alone.

    `cotangents` makes those of the values from them.
    """
    x, w, b = (a.astype(np.float64) for a in (x, w, b))
    h = x @ w.T + b
    column = np.broadcast_to(np.arange(N), h.shape)
    chosen = np.lexsort((column, -h, ~np.isnan(h)), axis=-1)[:, :k]
    values = np.take_along_axis(h, chosen, -1)
    c = cotangents(values)
    d_w, d_b = np.zeros_like(w), np.zeros_like(b)
    np.add.at(d_w, chosen, c[..., None] * x[:, None])
    np.add.at(d_b, chosen, c)
    return values, (np.einsum("bk,bkd->bd", c, w[chosen]), d_w, d_b)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("k", [3, N])
@pytest.mark.parametrize("kind", KINDS + WITH_NAN)
def test_gradients_of_the_selected_latents_alone(kind, k, implementation):
    arrays, rng = problem(kind)
    factors = rng.normal(size=(TOKENS, k)).astype(np.float32)

    def cotangents(values):
        return factors * values if kind in WITH_NAN else factors

    want_values, want = by_numpy(*arrays, k, cotangents)

    @jax.jit
    def encode(*arrays):
        values, pull = jax.vjp(lambda *a: pk.topk_encode(*a, k, implementation).values_BK, *arrays)
        return values, pull(jnp.asarray(cotangents(values)))

    values, got = encode(*arrays)
    np.testing.assert_allclose(values, want_values, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, want, strict=True):
        scale = np.nanmax(np.abs(other), initial=1)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)
    if kind in WITH_NAN:
        assert np.isnan(want_values).any() and all(np.isnan(other).any() for other in want)
