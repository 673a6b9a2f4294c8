"""Products with lists of pairs against dense algebra in numpy, block boundaries included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import pair_list
from pallas_kernels.pair_list import xla

# (B, C, L, D): one token, primes, more pairs than a block and not a multiple, all slots of a row.
SHAPES = [(1, 3, 5, 4), (13, 5, 31, 7), (40, 6, 97, 3), (8, 4, 4, 5)]
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}


def problem(shape, dtype, share=0.5, seed=0):
    """kept, values, indices (distinct within a row), w, a, and the dense code they stand for."""
    b, c, n, d = shape
    rng = np.random.default_rng(seed)
    indices = rng.permuted(np.tile(np.arange(n), (b, 1)), axis=1)[:, :c].astype(np.int32)
    kept = rng.random((b, c)) < share
    values, w, a = (rng.normal(size=s).astype(dtype) for s in ((b, c), (n, d), (b, d)))
    code = np.zeros((b, n))
    np.put_along_axis(code, indices, np.where(kept, values, 0), axis=1)
    return kept, values, indices, w, a, code


def assert_pairs(shape, dtype, implementation, share=0.5, seed=0):
    kept, values, indices, w, a, code = problem(shape, dtype, share, seed)
    b, _, n, _ = shape
    options = {"implementation": implementation}
    pairs = jax.jit(lambda *x: pair_list.compact(*x, n, **options))(kept, values, indices)
    count = int(pairs.count)
    assert count == kept.sum()
    lists = [np.asarray(x) for x in pairs[:3]]
    assert (lists[0][count:] == 0).all()
    assert (lists[1][count:] == b).all() and (lists[2][count:] == n).all()
    order = lists[2][:count].astype(int) * b + lists[1][:count]
    assert (np.diff(order) > 0).all(), "sorted by (latent, token)"
    np.testing.assert_array_equal(code[lists[1][:count], lists[2][:count]], lists[0][:count])

    def close(got, want):
        assert got.dtype == dtype
        scale = 1 + np.abs(want).max(initial=0)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * scale)

    w, a = jnp.asarray(w), jnp.asarray(a)
    close(pair_list.decode(pairs, w, b, **options), code @ w)
    inner = np.asarray(pair_list.dot(pairs, a, w, **options))
    close(inner[:count], (np.asarray(a, np.float64) @ w.T)[lists[1][:count], lists[2][:count]])
    assert (inner[count:] == 0).all()
    close(pair_list.add_outer(w, pairs, a, **options), w + code.T @ a)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_products_equal_dense_algebra(shape, share, implementation):
    assert_pairs(shape, np.float32, implementation, share)


@pytest.mark.parametrize("block", [8, 64])
def test_blocks_of_any_length(block, monkeypatch):
    """40 x 6 = 240 slots: filled to the brim, to a block's edge, and one over."""
    monkeypatch.setattr(xla, "_MOST_PAIRS", block)
    for share in (0.0, 0.27, 1.0):
        assert_pairs(SHAPES[2], np.float32, "xla", share)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_float64_is_kept(seed, share):
    with jax.enable_x64(True):
        assert_pairs(SHAPES[1], np.float64, "xla", share, seed)


def test_narrow_rows_are_accumulated_in_float32():
    kept, values, indices, w, a, code = problem(SHAPES[2], np.float32)
    pairs = pair_list.compact(kept, values, indices, len(w))
    narrow = jnp.asarray(w, jnp.bfloat16)
    got = pair_list.decode(pairs, narrow, len(a))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, code @ np.asarray(narrow, np.float64), atol=1e-5)
    total = pair_list.add_outer(jnp.zeros(w.shape), pairs, jnp.asarray(a, jnp.bfloat16))
    assert total.dtype == jnp.float32
    want = code.T @ np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(total, want, atol=1e-5)


def test_unused_rows_of_infinity_do_no_harm():
    """Gathers of unused entries read real rows: whatever those hold must not reach the result."""
    kept, values, indices, w, a, code = problem(SHAPES[1], np.float32, share=0.2)
    used = np.abs(code).sum(0) > 0
    w[~used] = np.inf
    pairs = pair_list.compact(kept, values, indices, len(w))
    got = pair_list.decode(pairs, jnp.asarray(w), len(a))
    np.testing.assert_allclose(got, code[:, used] @ w[used], atol=1e-4)


def test_unknown_implementation():
    kept, values, indices, w, *_ = problem(SHAPES[0], np.float32)
    with pytest.raises(ValueError, match=r"pair_list.compact.*'fast' does not exist"):
        pair_list.compact(kept, values, indices, len(w), implementation="fast")
