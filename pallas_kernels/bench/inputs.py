"""Inputs like those of an autoencoder at work: some latents fire always, most hardly ever.

Time depends on them: long lists of pairs of a popular latent, gathers of rows that are in cache or
not, ties and near misses of the selection. So tokens are sums of few rows of the weights, the rows
drawn with probabilities that fall as a power law, with log-normal values.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dense_sparse_matmul.vjp import dense_sparse_matmul
from pallas_kernels.shapes import Shape

DEAD_SHARE = 0.05  # latents that never fire
_MOST_POPULAR = 0.3  # share of the tokens that the most popular latents fire on
_FLATTENED = 10  # ranks over which the power law sets in
_VALUE_SPREAD = 0.7  # standard deviation of the logarithm of a value
_NOISE = 0.05  # norm of what no latent explains, per unit of a value


class Inputs(NamedTuple):
    """Arrays that the operations are timed on; floating ones in the compute dtype unless noted.

    Attributes:
      x_BD, e_BD: tokens, and as many residuals.
      w_LD, b_L: unit rows, and float32 zeros.
      values_BK, d_values_BK: float32, descending; and gradients of them.
      indices_BK: int32.
    """

    x_BD: jax.Array
    e_BD: jax.Array
    w_LD: jax.Array
    b_L: jax.Array
    values_BK: jax.Array
    d_values_BK: jax.Array
    indices_BK: jax.Array


def probabilities(n: int, k: int, seed: int) -> np.ndarray:
    """`[n]` float64: how often each latent fires; sums to k; latents of any rank lie anywhere."""
    live = max(n - int(DEAD_SHARE * n), k)
    weights = 1 / (np.arange(live) + _FLATTENED)
    most = min(max(_MOST_POPULAR, 1.5 * k / live), 1.0)
    low, high = 0.0, most / weights[-1]
    for _ in range(100):  # bisection: the sum grows with the factor
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.minimum(middle * weights, most).sum() < k else (low, middle)
        )
    every = np.zeros(n)
    every[:live] = np.minimum(high * weights, most)
    return np.random.default_rng(seed).permutation(every)


def rotation(shape: Shape, dtype: jnp.dtype, least_bytes: int) -> int:
    """How many sets of inputs to take turns with, so that together they exceed the caches."""
    item = jnp.dtype(dtype).itemsize
    one = item * shape.d * (2 * shape.tokens + shape.n) + 12 * shape.k * shape.tokens
    return int(np.clip(-(-least_bytes // one), 2, 16))


def make(shape: Shape, dtype: jnp.dtype, seed: int) -> Inputs:
    """One set of inputs."""
    ends_L = np.cumsum(probabilities(shape.n, shape.k, seed)) * (1 + 1e-12)
    return _make(shape, jnp.dtype(dtype), jax.random.key(seed), ends_L.astype(np.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make(shape: Shape, dtype: jnp.dtype, key: jax.Array, ends_L: jax.Array) -> Inputs:
    keys = iter(jax.random.split(key, 6))
    w_LD = jax.random.normal(next(keys), (shape.n, shape.d))
    w_LD = w_LD / jnp.sqrt(jnp.square(w_LD).sum(-1, keepdims=True))
    # Systematic sampling: k points a distance of 1 apart fall into k different intervals.
    points_BK = jax.random.uniform(next(keys), (shape.tokens, 1)) + jnp.arange(shape.k)
    indices_BK = jnp.searchsorted(ends_L, points_BK, side="right").astype(jnp.int32)
    indices_BK = jnp.minimum(indices_BK, shape.n - 1)
    values_BK = jnp.exp(_VALUE_SPREAD * jax.random.normal(next(keys), indices_BK.shape))
    order_BK = jnp.argsort(-values_BK, axis=1)
    values_BK, indices_BK = (
        jnp.take_along_axis(a, order_BK, axis=1) for a in (values_BK, indices_BK)
    )
    rest_BD = jax.random.normal(next(keys), (shape.tokens, shape.d)) * _NOISE / shape.d**0.5
    w_LD = w_LD.astype(dtype)
    x_BD = dense_sparse_matmul(values_BK, indices_BK, w_LD, "xla") + rest_BD
    e_BD = jax.random.normal(next(keys), x_BD.shape) / shape.d**0.5
    return Inputs(
        x_BD=x_BD.astype(dtype),
        e_BD=e_BD.astype(dtype),
        w_LD=w_LD,
        b_L=jnp.zeros(shape.n),
        values_BK=values_BK,
        d_values_BK=jax.random.normal(next(keys), values_BK.shape),
        indices_BK=indices_BK,
    )
