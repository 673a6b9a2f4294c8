"""The sparse kernels for GPUs, interpreted, against the plain definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.decode_loss import mosaic_gpu as decode_kernel
from pallas_kernels.decode_loss.api import decode_loss
from pallas_kernels.dense_sparse_matmul.vjp import dense_sparse_matmul
from pallas_kernels.matmul_at_sparse_indices.vjp import matmul_at_sparse_indices
from pallas_kernels.pair_list.pairs import Pairs
from pallas_kernels.row_update import mosaic_gpu as update_kernel
from pallas_kernels.row_update.api import RowScalars, RowSettings, row_update
from pallas_kernels.weight_grads import mosaic_gpu as grads_kernel
from pallas_kernels.weight_grads import segments
from pallas_kernels.weight_grads.api import WeightGrads, weight_grads, weight_grads_of_pairs
from pallas_kernels.weight_grads_update.api import Rows, weight_grads_update
from tests.kernels.gpu_interpreter import interpreted  # first: skips where there is none

F32, BF16 = jnp.float32, jnp.bfloat16


def integers(rng, shape, dtype=F32):
    """Small whole numbers: their sums are exact in any order."""
    return jnp.asarray(rng.integers(-3, 4, shape), dtype)


def code(rng, tokens, k, n):
    """Values and indices; the same row may occur twice, and every third row never does."""
    indices = rng.integers(0, n, (tokens, k))
    return integers(rng, (tokens, k)), jnp.asarray(np.where(indices % 3, indices, 1 % n), jnp.int32)


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


# tokens, k, n, d, dtype of rows, bytes of rows in a slice: k below, at and above a group of rows;
# a block's tokens and a rest; rows in one slice and in several.
DECODES = [
    (11, 5, 13, 256, BF16, None),
    (2, 13, 40, 384, F32, 16 * 128 * 4),
    (1, 8, 1, 128, BF16, None),
]


@pytest.mark.parametrize("tokens, k, n, d, dtype, slice_bytes", DECODES)
def test_decode_loss(tokens, k, n, d, dtype, slice_bytes, monkeypatch):
    if slice_bytes:
        monkeypatch.setattr(decode_kernel, "_SLICE_BYTES", slice_bytes)
    rng = np.random.default_rng(0)
    values, indices = code(rng, tokens, k, n)
    w, target = integers(rng, (n, d), dtype), integers(rng, (tokens, d), dtype)
    call = functools.partial(decode_loss, residual_dtype=F32)
    want = call(values, indices, w, target, implementation="reference")
    assert_equal(interpreted(call, values, indices, w, target), want)


def test_products_are_of_the_rounded_residual():
    rng = np.random.default_rng(1)
    _, indices = code(rng, 3, 4, 9)
    values, w, target = (rng.normal(size=size) for size in ((3, 4), (9, 128), (3, 128)))
    args = (jnp.asarray(values, F32), indices, jnp.asarray(w, BF16), jnp.asarray(target, BF16))
    want = decode_loss(*args, implementation="reference")
    got = interpreted(decode_loss, *args)
    assert got.residual_BD.dtype == BF16
    np.testing.assert_array_equal(got.residual_BD.astype(F32), want.residual_BD.astype(F32))
    np.testing.assert_allclose(got.inner_BK, want.inner_BK, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.squared_error_B, want.squared_error_B, rtol=1e-6)


@pytest.fixture
def small_steps(monkeypatch):
    """Segments longer than 4 pairs are cut, rows wider than 256 are sliced."""
    cut = functools.partial(segments.segments, longest=4)
    monkeypatch.setattr(segments, "segments", cut)
    monkeypatch.setattr(grads_kernel, "_WIDEST", 256)


# tokens, k, n, d, dtypes of e and x: pieces; two slices and no multiple of a block's rows; one row.
GRADS = [(17, 3, 6, 128, BF16, F32), (9, 2, 5, 512, F32, BF16), (2, 1, 1, 128, BF16, BF16)]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("tokens, k, n, d, e_dtype, x_dtype", GRADS)
def test_weight_grads(tokens, k, n, d, e_dtype, x_dtype):
    rng = np.random.default_rng(1)
    values, indices = code(rng, tokens, k, n)
    d_values = integers(rng, (tokens, k))
    e, x = integers(rng, (tokens, d), e_dtype), integers(rng, (tokens, d), x_dtype)
    args = (values, d_values, indices, e, x, n)
    want = weight_grads(*args, implementation="reference")
    assert_equal(interpreted(weight_grads, *args), want)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("used", [23, 0])
def test_weight_grads_of_pairs_are_added_to_totals(used):
    """Unused entries name a token and a latent that do not exist, and their coefficient is NaN."""
    rng = np.random.default_rng(2)
    tokens, n, d, unused = 8, 7, 128, 5
    latents, of_tokens = np.sort(rng.integers(0, n, used)), rng.integers(0, tokens, used)
    pad = functools.partial(np.pad, pad_width=(0, unused))
    pairs = Pairs(
        jnp.asarray(pad(rng.integers(-3, 4, used)), F32),
        jnp.asarray(pad(of_tokens, constant_values=tokens), jnp.int32),
        jnp.asarray(pad(latents, constant_values=n), jnp.int32),
        jnp.int32(used),
    )
    d_values = pad(rng.integers(-3, 4, used).astype(np.float32))
    totals = WeightGrads(*(integers(rng, shape) for shape in ((n, d), (n, d), (n,))))
    e, x = integers(rng, (tokens, d), BF16), integers(rng, (tokens, d), BF16)
    call = functools.partial(weight_grads_of_pairs, n=n)
    want = call(pairs, jnp.asarray(d_values), e, x, totals=totals, implementation="reference")
    d_values[used:] = np.nan
    got = interpreted(call, pairs, jnp.asarray(d_values), e, x, totals=totals)
    assert_equal(got, want)


ADAM = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
DECODER = RowSettings(**ADAM, ema_decay=0.99, project=True, unit_norm=True)
SCALARS = RowScalars(jnp.float32(1e-2), jnp.int32(3), jnp.float32(0.7))


def rows(rng, n, d, settings):
    """Weights, whose third row is zero, and the optimizer's state."""
    w, mu, nu, ema = (jnp.asarray(rng.normal(size=(n, d)), F32) for _ in range(4))
    w = w.at[2:3].set(0)
    return Rows(w, mu, jnp.square(nu), None if settings.ema_decay is None else ema)


def assert_close(got, want):
    """To 1e-6 of what is largest in an array; copies to their own precision."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b, rounding = np.asarray(a, F32), np.asarray(b, F32), 2**-8 if a.dtype == BF16 else 0
        np.testing.assert_allclose(a, b, rtol=rounding, atol=1e-6 * (1e-3 + np.abs(b).max()))


@pytest.mark.parametrize(
    "n, d, settings, copy_dtype, accept",
    [
        (5, 384, DECODER, BF16, None),  # chunks of two sizes; no multiple of a block's rows
        (5, 384, DECODER, BF16, False),
        (3, 128, RowSettings(**ADAM), None, True),
        (1, 2560, RowSettings(**ADAM, project=True), F32, None),  # more chunks than read together
    ],
)
def test_row_update(n, d, settings, copy_dtype, accept):
    rng = np.random.default_rng(3)
    state = rows(rng, n, d, settings)
    g = jnp.asarray(rng.normal(size=(n, d)), F32).at[0].set(0)
    scalars = SCALARS._replace(accept=None if accept is None else jnp.asarray(accept))
    args = (state.w_LD, g, state.mu_LD, state.nu_LD, state.ema_LD, scalars)
    call = functools.partial(row_update, settings=settings, copy_dtype=copy_dtype)
    assert_close(interpreted(call, *args), call(*args, implementation="reference"))
    assert np.isfinite(state.w_LD).all(), "the caller's array is untouched"


def test_a_wide_row_waits_for_its_norm_in_memory(monkeypatch):
    """As a narrow one in registers, to the bit: the same products in the same order."""
    rng = np.random.default_rng(3)
    state = rows(rng, 5, 384, DECODER)
    g = jnp.asarray(rng.normal(size=(5, 384)), F32)
    args = (state.w_LD, g, state.mu_LD, state.nu_LD, state.ema_LD, SCALARS)
    call = functools.partial(row_update, settings=DECODER, copy_dtype=BF16)
    once, stores = update_kernel.gpu_rows.store, []
    monkeypatch.setattr(update_kernel.gpu_rows, "store", lambda *a: (stores.append(a), once(*a))[1])
    held = interpreted(call, *args)
    n_held, stores[:] = len(stores), []
    monkeypatch.setattr(update_kernel, "_HELD", 256)
    jax.tree.map(np.testing.assert_array_equal, interpreted(call, *args), held)
    assert len(stores) > n_held


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("tokens", [17, 0])
def test_weight_grads_update(tokens):
    rng = np.random.default_rng(4)
    k, n, d, encoder = 3, 7, 256, RowSettings(**ADAM, ema_decay=0.9)
    values, indices = code(rng, tokens, k, n)
    d_values = integers(rng, (tokens, k))
    e, x = integers(rng, (tokens, d), BF16), integers(rng, (tokens, d), BF16)
    dec, enc = rows(rng, n, d, DECODER), rows(rng, n, d, encoder)
    call = functools.partial(
        weight_grads_update, dec_settings=DECODER, enc_settings=encoder, copy_dtype=BF16
    )
    args = (values, d_values, indices, e, x, dec, enc, SCALARS)
    assert_close(interpreted(call, *args), call(*args, implementation="xla"))


def test_products_of_sharded_latents():
    tokens, k, d, dtype = 5, 9, 256, BF16
    rng = np.random.default_rng(5)
    values, indices = code(rng, tokens, k, 12)
    w, a = integers(rng, (12, d), dtype), integers(rng, (tokens, d))
    got = interpreted(
        lambda *x, implementation: dense_sparse_matmul(*x, implementation), values, indices, w
    )
    assert_equal(got, dense_sparse_matmul(values, indices, w, "reference"))
    call = matmul_at_sparse_indices
    got = interpreted(lambda *x, implementation: call(*x, implementation), a, w, indices)
    assert_equal(got, call(a, w, indices, "reference"))


def refusals():
    """What to call, with shapes it cannot take, and words of the reason."""
    S = jax.ShapeDtypeStruct
    code = (S((4, 2), F32), S((4, 2), jnp.int32))
    wide = S((8, 12416), F32)
    grads = (*code[:1], *code[:1], code[1])
    scalars = RowScalars(S((), F32), S((), jnp.int32), S((), F32))
    many = (S((4, 900), F32), S((4, 900), jnp.int32))
    matrix, rows = S((8, 96), F32), S((4, 96), F32)
    double = S((8, 128), jnp.float64)
    settled = {"settings": RowSettings(**ADAM)}
    return [
        (decode_loss, (*code, matrix, rows), {}, "rows of 96"),
        (decode_loss, (*many, S((8, 128), BF16), S((4, 128), BF16)), {}, "k = 900"),
        (decode_loss, (*code, double, S((4, 128), F32)), {}, "float64"),
        (weight_grads, (*grads, rows, rows, 8), {}, "rows of 96"),
        (row_update, (*[wide] * 4, None, scalars), settled, "12416"),
        (row_update, (*[double] * 4, None, scalars), settled, "float32"),
    ]


@pytest.mark.parametrize("op, args, kwargs, reason", refusals())
def test_refusals_name_the_limit(op, args, kwargs, reason):
    with dispatch.target("gpu", "NVIDIA H200"), pytest.raises(NotImplementedError, match=reason):
        op(*args, **kwargs, implementation="mosaic_gpu")
