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


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def pairs_of(length, **changed):
    lists = (spec(length), *[spec(length, dtype="int32")] * 2, spec(dtype="int32"))
    return pair_list.Pairs(*lists)._replace(**changed)


def compact(
    kept=(4, 3), values=(4, 3), indices=(4, 3), n=8, kept_dtype="bool", indices_dtype="int32"
):
    kept, indices = spec(*kept, dtype=kept_dtype), spec(*indices, dtype=indices_dtype)
    return pair_list.compact(kept, spec(*values), indices, n)


BAD = {
    "kept": (lambda: compact(kept=(4,)), r"compact: kept_BC has shape \[4\], but must have \[\*, "),
    "values": (
        lambda: compact(values=(4, 2)),
        r"compact: values_BC has shape \[4, 2\], .* \[4, 3\]",
    ),
    "indices": (lambda: compact(indices=(3, 3)), r"compact: indices_BC has shape \[3, 3\]"),
    "number of latents": (lambda: compact(n=0), r"compact: n_latents = 0 must be a whole number"),
    "latents' numbers": (
        lambda: compact(n=2**31),
        r"compact: a column of n_latents = 2147483648 has 2147483648 entries .* than 2\*\*31",
    ),
    "slots": (
        lambda: compact(*[(2**26, 32)] * 3),
        r"compact: kept_BC of shape \[67108864, 32\] has 2147483648 entries",
    ),
    "rank of the list": (
        lambda: pair_list.decode(pairs_of(9, values_P=spec(9, 1)), spec(8, 4), 4),
        r"decode: pairs.values_P has shape \[9, 1\], but must have \[\*\]",
    ),
    "length of the list": (
        lambda: pair_list.dot(pairs_of(9, tokens_P=spec(8, dtype="int32")), spec(4, 5), spec(8, 5)),
        r"dot: pairs.tokens_P has shape \[8\], but must have \[9\]",
    ),
    "count": (
        lambda: pair_list.add_outer(spec(8, 5), pairs_of(9, count=spec(1)), spec(4, 5)),
        r"add_outer: pairs.count has shape \[1\], but must have \[\]",
    ),
    "rows": (
        lambda: pair_list.decode(pairs_of(9), spec(8), 4),
        r"decode: w_LD has shape \[8\], but must have \[\*, \*\]",
    ),
    "number of tokens": (
        lambda: pair_list.decode(pairs_of(9), spec(8, 4), -1),
        r"decode: n_tokens = -1 must be a whole number of at least 0",
    ),
    "B * d": (
        lambda: pair_list.decode(pairs_of(9), spec(8, 1024), 2**21),
        r"decode: the result of shape \[2097152, 1024\] has 2147483648 entries",
    ),
    "rows of both": (
        lambda: pair_list.dot(pairs_of(9), spec(4, 5), spec(8, 6)),
        r"dot: w_LD has shape \[8, 6\], but must have \[\*, 5\]",
    ),
    "n * d": (
        lambda: pair_list.dot(pairs_of(9), spec(4, 1024), spec(2**21, 1024)),
        r"dot: w_LD of shape \[2097152, 1024\] has 2147483648 entries",
    ),
    "width of the total": (
        lambda: pair_list.add_outer(spec(8, 6), pairs_of(9), spec(4, 5)),
        r"add_outer: a_BD has shape \[4, 5\], but must have \[\*, 6\]",
    ),
    "dtype of the total": (
        lambda: pair_list.add_outer(spec(8, 5, dtype="int32"), pairs_of(9), spec(4, 5)),
        r"add_outer: total_LD has dtype int32, but must be one of bfloat16, float32, float64",
    ),
    "dtype of what is kept": (
        lambda: compact(kept_dtype="int8"),
        r"compact: kept_BC has dtype int8, but must be one of bool",
    ),
    "dtype of the indices": (
        lambda: compact(indices_dtype="uint32"),
        r"compact: indices_BC has dtype uint32, but must be one of int32",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_unknown_implementation():
    kept, values, indices, w, *_ = problem(SHAPES[0], np.float32)
    with pytest.raises(ValueError, match=r"pair_list.compact.*'fast' does not exist"):
        pair_list.compact(kept, values, indices, len(w), implementation="fast")
