"""Sums whose order is fixed, as programs for GPUs have them; carried out on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import ordered, pair_list
from pallas_kernels.pair_list import xla

on_gpu = functools.partial(pk.target, "gpu", "NVIDIA A100")


def integers(rng, shape):
    """Their sums are exact in any order."""
    return rng.integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("places", [[], [3], [0, 0, 0], [1, 2, 2, 2, 2, 5, 6, 6], [4, 7, 7, 9, 9]])
def test_runs_are_added_once(places, width):
    """Places of 7 and above do not exist, and neither they nor what is beside a run spoils it."""
    rng = np.random.default_rng(0)
    row = () if width is None else (width,)
    places = np.asarray(places, np.int32)
    total, parts = integers(rng, (7, *row)), integers(rng, (len(places), *row))
    parts[places >= 7] = np.nan
    want = total.copy()
    np.add.at(want, places[places < 7], parts[places < 7])
    with on_gpu():
        got = jax.jit(ordered.add_runs)(total, parts, places)
    np.testing.assert_array_equal(got, want)


# Tokens, k, n: most latents once; few latents often; one token.
SHAPES = [(40, 6, 97), (150, 7, 3), (1, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [16, 4096])
def test_programs_for_gpus_add_the_same(shape, block, monkeypatch):
    monkeypatch.setattr(xla, "_BLOCK_BYTES", block * 4 * 8)
    rng = np.random.default_rng(1)
    tokens, k, n = shape
    k = min(k, n)
    values, d_values = integers(rng, (tokens, k)), integers(rng, (tokens, k))
    order = rng.permuted(np.tile(np.arange(n), (tokens, 1)), axis=1)
    indices = order[:, :k].astype(np.int32)
    e, x, w = integers(rng, (tokens, 8)), integers(rng, (tokens, 8)), integers(rng, (n, 8))
    totals = pk.WeightGrads(integers(rng, (n, 8)), integers(rng, (n, 8)), integers(rng, n))

    def results(implementation):
        named = {"implementation": implementation}
        pairs = pair_list.compact(values > 0, values, indices, n, **named)
        return (
            pk.weight_grads(values, d_values, indices, e, x, n, totals=totals, **named),
            pk.weight_grads_of_pairs(pairs, pairs.values_P, e, x, n, totals=totals, **named),
            pk.sparse_transpose_matmul(values, indices, e, n, **named),
            pair_list.decode(pairs, w, tokens, **named),
            pair_list.add_outer(w, pairs, e, **named),
        )

    with on_gpu():
        got = results("xla")
    jax.tree.map(np.testing.assert_array_equal, got, results("reference"))


def test_no_tokens_at_all():
    code = jnp.zeros((0, 2)), jnp.zeros((0, 2), jnp.int32)
    with on_gpu():
        got = pk.sparse_transpose_matmul(*code, jnp.zeros((0, 3)), 4, implementation="xla")
    np.testing.assert_array_equal(got, np.zeros((4, 3)))
