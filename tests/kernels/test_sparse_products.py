"""The three sparse products and their gradients against dense algebra in numpy and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    dense_sparse_matmul,
    matmul_at_sparse_indices,
    sparse_transpose_matmul,
)
from pallas_kernels.dense_sparse_matmul import reference as decode_reference
from pallas_kernels.matmul_at_sparse_indices import reference as at_reference

IMPLEMENTATIONS = ["xla", "reference"]
# (B, L, D, K): one token, primes, more tokens than a block of 64 and not a multiple, K = L, K = 1.
SHAPES = [(1, 5, 3, 2), (7, 13, 11, 5), (130, 31, 6, 9), (4, 6, 5, 6), (9, 40, 8, 1)]
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}

quick = settings(max_examples=8, deadline=None, derandomize=True, database=None)


def problem(shape, dtype, seed=0, duplicates=True):
    """values, indices, w, a; indices repeat within rows unless told otherwise."""
    b, n, d, k = shape
    rng = np.random.default_rng(seed)
    if duplicates:
        indices = rng.integers(0, n, size=(b, k))
        indices[:, -1] = indices[:, 0]
    else:
        indices = rng.permuted(np.tile(np.arange(n), (b, 1)), axis=1)[:, :k]
    values, w, a = (rng.normal(size=s).astype(dtype) for s in ((b, k), (n, d), (b, d)))
    return values, indices.astype(np.int32), w, a


def dense_code(values, indices, n):
    code = np.zeros((len(values), n))
    for row, v, i in zip(code, values, indices):
        np.add.at(row, i, v)
    return code


def assert_close(got, want, dtype):
    assert got.dtype == dtype
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * (1 + np.abs(want).max()))


def assert_products(shape, dtype, implementation, seed=0, duplicates=True):
    values, indices, w, a = problem(shape, dtype, seed, duplicates)
    code = dense_code(values, indices, len(w))
    by_index = np.take_along_axis(a.astype(np.float64) @ w.T.astype(np.float64), indices, 1)
    arrays = [jnp.asarray(array) for array in (values, indices, w, a)]
    v, i, w_, a_ = arrays
    got = dense_sparse_matmul(v, i, w_, implementation)
    assert_close(got, code @ w, dtype)
    assert_close(matmul_at_sparse_indices(a_, w_, i, implementation), by_index, dtype)
    got = sparse_transpose_matmul(v, i, a_, len(w), implementation=implementation)
    assert_close(got, code.T @ a, dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_dense_algebra(shape, implementation):
    assert_products(shape, np.float32, implementation)
    with jax.enable_x64(True):
        assert_products(shape, np.float64, implementation)


@quick
@given(
    b=st.integers(1, 70),
    n=st.integers(1, 40),
    d=st.integers(1, 12),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_products_on_drawn_shapes(b, n, d, share, seed):
    k = 1 + round(share * (n - 1))
    with jax.enable_x64(True):
        assert_products((b, n, d, k), np.float64, "xla", seed, duplicates=False)


GRADIENTS = {
    "dense_sparse_matmul": (
        lambda implementation: lambda v, w, i, a: dense_sparse_matmul(v, i, w, implementation),
        lambda v, w, i, a: decode_reference.dense_sparse_matmul(v, i, w),
        lambda v, w, a: (v, w),
    ),
    "matmul_at_sparse_indices": (
        lambda implementation: lambda a, w, i, v: matmul_at_sparse_indices(a, w, i, implementation),
        lambda a, w, i, v: at_reference.matmul_at_sparse_indices(a, w, i),
        lambda v, w, a: (a, w),
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", GRADIENTS)
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_vjp_equals_autodiff_of_the_plain_definition(shape, op, implementation):
    make, plain, pick = GRADIENTS[op]
    with jax.enable_x64(True):
        v, i, w, a = (jnp.asarray(array) for array in problem(shape, np.float64))
        first, second = pick(v, w, a)
        got_out, got = jax.vjp(lambda p, q: make(implementation)(p, q, i, v), first, second)
        want_out, want = jax.vjp(lambda p, q: plain(p, q, i, v), first, second)
        np.testing.assert_allclose(got_out, want_out, rtol=1e-12, atol=1e-12)
        d_out = jnp.asarray(np.random.default_rng(3).normal(size=got_out.shape))
        for one, other in zip(got(d_out), want(d_out)):
            assert np.abs(other).max() > 0
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", GRADIENTS)
def test_vjp_equals_finite_differences(op):
    make, _, pick = GRADIENTS[op]
    with jax.enable_x64(True):
        v, i, w, a = (jnp.asarray(array) for array in problem(SHAPES[1], np.float64))
        point = pick(v, w, a)
        rng = np.random.default_rng(4)
        away = [jnp.asarray(rng.normal(size=p.shape)) for p in point]

        def f(t):
            first, second = (p + t * q for p, q in zip(point, away))
            return jnp.sin(make("xla")(first, second, i, v)).sum()

        step = 1e-5
        slope = (f(step) - f(-step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(f)(0.0), slope, rtol=1e-7)


def test_a_repeated_index_adds():
    values, indices = jnp.asarray([[2.0, 3.0]]), jnp.asarray([[1, 1]])
    w = jnp.asarray([[1.0, 1.0], [10.0, 20.0]])
    for implementation in IMPLEMENTATIONS:
        out = dense_sparse_matmul(values, indices, w, implementation)
        np.testing.assert_array_equal(out, [[50.0, 100.0]])
        got = sparse_transpose_matmul(
            values, indices, jnp.asarray([[1.0, -1.0]]), 2, implementation=implementation
        )
        np.testing.assert_array_equal(got, [[0.0, 0.0], [5.0, -5.0]])


def test_nan_in_one_row_stays_there():
    values, indices, w, _ = problem((5, 8, 4, 2), np.float32, duplicates=False)
    values[2, 1] = np.nan
    for implementation in IMPLEMENTATIONS:
        out = dense_sparse_matmul(*map(jnp.asarray, (values, indices, w)), implementation)
        assert np.isnan(out[2]).all()
        assert not np.isnan(np.delete(out, 2, 0)).any()


def test_mixed_precision_accumulates_in_the_wider_dtype():
    values, indices, w, a = problem((6, 9, 5, 3), np.float32)
    narrow = jnp.asarray(w, jnp.bfloat16)
    v, i, a_ = map(jnp.asarray, (values, indices, a))
    wide = narrow.astype(jnp.float32)
    got, want = dense_sparse_matmul(v, i, narrow), dense_sparse_matmul(v, i, wide)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    got, want = matmul_at_sparse_indices(a_, narrow, i), matmul_at_sparse_indices(a_, wide, i)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "op, call",
    [
        ("dense_sparse_matmul", lambda v, i, w, a: dense_sparse_matmul(v, i, w, "cuda")),
        ("matmul_at_sparse_indices", lambda v, i, w, a: matmul_at_sparse_indices(a, w, i, "cuda")),
        (
            "sparse_transpose_matmul",
            lambda v, i, w, a: sparse_transpose_matmul(v, i, a, 4, implementation="cuda"),
        ),
    ],
)
def test_unknown_implementation(op, call):
    with pytest.raises(ValueError, match=rf"{op}: implementation = 'cuda'.*reference.*xla"):
        call(*map(jnp.asarray, problem((2, 4, 3, 2), np.float32)))
