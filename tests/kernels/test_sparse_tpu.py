"""The sparse kernels for TPUs, interpreted, against the plain definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.decode_loss import mosaic_tpu as decode_kernel
from pallas_kernels.decode_loss.api import decode_loss
from pallas_kernels.dense_sparse_matmul.vjp import dense_sparse_matmul
from pallas_kernels.matmul_at_sparse_indices import api as at_indices
from pallas_kernels.pair_list.pairs import Pairs
from pallas_kernels.row_update import mosaic_tpu as row_kernel
from pallas_kernels.row_update.api import RowScalars, RowSettings, row_update
from pallas_kernels.weight_grads import mosaic_tpu as grads_kernel
from pallas_kernels.weight_grads.api import WeightGrads, weight_grads, weight_grads_of_pairs
from tests.kernels.tpu_interpreter import interpreted, interpreter

F32, BF16 = jnp.float32, jnp.bfloat16


def integers(rng, shape, dtype=F32, most=4):
    """Small whole numbers: their sums are exact in any order."""
    return jnp.asarray(rng.integers(-most, most + 1, shape), dtype)


def code(rng, tokens, k, n):
    """A code whose tokens name their rows out of order, some rows twice."""
    return integers(rng, (tokens, k)), jnp.asarray(rng.integers(0, n, (tokens, k)), jnp.int32)


@pytest.fixture
def without_aliases(monkeypatch):
    """The interpreter cannot alias a matrix whose last block is not full."""
    pallas_call = pl.pallas_call

    def unaliased(*args, input_output_aliases, **kwargs):
        del input_output_aliases
        return pallas_call(*args, **kwargs)

    monkeypatch.setattr(pl, "pallas_call", unaliased)


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def assert_decodes(values, indices, w, target):
    call = functools.partial(decode_loss, residual_dtype=F32)
    want = call(values, indices, w, target, implementation="reference")
    assert_equal(interpreted(call, values, indices, w, target), want)


def test_decode_loss_of_more_than_a_block():
    rng = np.random.default_rng(0)
    values, indices = code(rng, 130, 1, 24)
    assert_decodes(values, indices, integers(rng, (24, 128)), integers(rng, (130, 128)))


def test_decode_loss_of_rows_in_pieces(monkeypatch):
    """Rows too wide for a slot; more pieces than slots."""
    monkeypatch.setattr(decode_kernel, "_SLOT_BYTES", 2**13)
    monkeypatch.setattr(decode_kernel, "_ROWS_AHEAD", 24)
    rng = np.random.default_rng(0)
    values, indices = code(rng, 5, 8, 24)
    assert_decodes(values, indices, integers(rng, (24, 1024), BF16), integers(rng, (5, 1024), BF16))


def test_decode_loss_keeps_bad_numbers_in_their_tokens():
    """Slots that k does not fill, a width in unequal spans, a target of another dtype."""
    rng = np.random.default_rng(0)
    values, indices = code(rng, 7, 5, 40)
    w, target = integers(rng, (40, 640)), integers(rng, (7, 640), BF16)
    w = w.at[indices[2, 1], 5].set(jnp.nan).at[indices[4, 0], 300].set(jnp.inf)
    values, target = values.at[5, 2].set(jnp.nan), target.at[6, 1].set(jnp.nan)
    assert_decodes(values, indices, w, target)


def test_halves_of_decode_loss():
    rng = np.random.default_rng(4)
    values, indices = code(rng, 6, 3, 24)
    w, a = integers(rng, (24, 512)), integers(rng, (6, 512))
    call = (a, w, indices)
    want = at_indices.compute(*call, implementation="reference")
    assert_equal(interpreted(at_indices.compute, *call), want)
    call = (values.astype(BF16), indices, w.astype(BF16))
    want = dense_sparse_matmul(*call, implementation="reference")
    assert_equal(interpreted(dense_sparse_matmul, *call), want)


def sorted_pairs(values, d_values, indices, n, unused=0):
    """A code as the list of its pairs, with unused entries, whose coefficients are NaN, behind."""
    tokens, k = indices.shape
    order = np.argsort(np.asarray(indices).reshape(-1), kind="stable")
    pad = functools.partial(np.pad, pad_width=(0, unused))
    pairs = Pairs(
        values_P=jnp.asarray(pad(np.asarray(values).reshape(-1)[order])),
        tokens_P=jnp.asarray(pad(order // k, constant_values=tokens), jnp.int32),
        latents_P=jnp.asarray(pad(np.asarray(indices).reshape(-1)[order], constant_values=n)),
        count=jnp.int32(order.size),
    )
    return pairs, jnp.asarray(pad(np.asarray(d_values).reshape(-1)[order], constant_values=np.nan))


@pytest.fixture
def small_steps(monkeypatch):
    """Chunks of 16 pairs, blocks of 8 latents, rings of 4 rows: a few pairs make many steps."""
    monkeypatch.setattr(grads_kernel, "_CHUNK", 16)
    monkeypatch.setattr(grads_kernel, "_MOST_LATENTS", 8)
    monkeypatch.setattr(grads_kernel, "_MOST_AHEAD", 4)


# tokens, k, n, d, dtypes of e and x: words shared, and not.
GRADS = [(11, 3, 30, 128, BF16, BF16), (7, 3, 12, 640, BF16, F32)]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("tokens, k, n, d, e_dtype, x_dtype", GRADS)
def test_weight_grads(tokens, k, n, d, e_dtype, x_dtype):
    rng = np.random.default_rng(1)
    values, indices = code(rng, tokens, k, n)
    d_values, e, x = (
        integers(rng, shape, dtype)
        for shape, dtype in (((tokens, k), F32), ((tokens, d), e_dtype), ((tokens, d), x_dtype))
    )
    want = weight_grads(values, d_values, indices, e, x, n, implementation="reference")
    assert_equal(interpreted(weight_grads, values, d_values, indices, e, x, n), want)


@pytest.mark.usefixtures("small_steps")
def test_weight_grads_of_pairs():
    """Added to totals; latents without pairs keep theirs."""
    rng = np.random.default_rng(2)
    tokens, k, n, d = 20, 2, 32, 128
    values, indices = code(rng, tokens, k, n)
    d_values, e, x = (integers(rng, s) for s in ((tokens, k), (tokens, d), (tokens, d)))
    e, x = e.astype(BF16), x.astype(BF16)
    totals = WeightGrads(*(integers(rng, shape) for shape in ((n, d), (n, d), (n,))))
    run = interpreter(weight_grads_of_pairs, static_argnums=(4,))
    cases = {
        "any": indices,
        "a long segment": jnp.where(indices % 8 == 0, indices, 17),
        "one block of latents": 8 + indices % 8,
    }
    for case in cases.values():
        pairs, d_values_P = sorted_pairs(values, d_values, case, n, unused=40)
        call = (values, d_values, case, e, x, n)
        want = weight_grads(*call, totals=totals, implementation="reference")
        assert_equal(run(pairs, d_values_P, e, x, n, totals=totals), want)
    none = pairs._replace(count=jnp.int32(0))
    assert_equal(run(none, d_values_P, e, x, n, totals=totals), totals)


@pytest.mark.usefixtures("small_steps", "without_aliases")
def test_totals_of_latents_that_fill_no_block():
    rng = np.random.default_rng(5)
    values, indices = code(rng, 9, 2, 21)
    d_values, e, x = (integers(rng, shape) for shape in ((9, 2), (9, 256), (9, 256)))
    x = x.at[4, 7].set(jnp.nan)
    totals = WeightGrads(*(integers(rng, shape) for shape in ((21, 256), (21, 256), (21,))))
    call = (values, d_values, indices, e, x, 21)
    want = weight_grads(*call, totals=totals, implementation="reference")
    got = interpreted(weight_grads, *call, totals=totals)
    # The reference spreads a token's NaN over all latents; the kernel keeps it to those it names.
    named = np.isin(np.arange(21), indices[4])
    assert np.isnan(got.w_enc_LD[named, 7]).all() and np.isnan(want.w_enc_LD[:, 7]).all()
    assert_equal(got._replace(w_enc_LD=0 * got.w_dec_LD), want._replace(w_enc_LD=0 * want.w_dec_LD))
    others = np.arange(256) != 7
    np.testing.assert_array_equal(got.w_enc_LD[:, others], want.w_enc_LD[:, others])
    assert np.isfinite(got.w_enc_LD[~named]).all()


def no_wait(*args):
    """What a kernel that forgets to wait for its rows does."""


@pytest.mark.parametrize("kernel", [decode_kernel, grads_kernel])
def test_a_missing_wait_is_found(monkeypatch, kernel):
    monkeypatch.setattr(kernel, "_wait", no_wait)
    rng = np.random.default_rng(6)
    values, indices = code(rng, 6, 3, 24)
    w, e = integers(rng, (24, 512)), integers(rng, (6, 512))
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        if kernel is decode_kernel:
            want = decode_loss(values, indices, w, e, implementation="reference")
            assert_equal(interpreted(decode_loss, values, indices, w, e), want)
        else:
            call = (values, values, indices, e, e, 24)
            want = weight_grads(*call, implementation="reference")
            assert_equal(interpreted(weight_grads, *call), want)


PLAIN = RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8)
FULL = RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, ema_decay=0.9, project=True, unit_norm=True)


@pytest.mark.parametrize(
    "settings, copy_dtype, n", [(PLAIN, None, 48), (FULL, BF16, 48), (FULL, F32, 37)]
)
def test_row_update(monkeypatch, request, settings, copy_dtype, n):
    """Blocks of 16 rows, the last not full; one row is zero, one has no gradient."""
    if n % 16:
        request.getfixturevalue("without_aliases")
    monkeypatch.setattr(row_kernel, "_MOST_ROWS", 16)
    rng = np.random.default_rng(7)
    w, g, mu, ema = (jnp.asarray(rng.normal(size=(n, 256)), F32) for _ in range(4))
    w, g, nu = w.at[3].set(0), g.at[20].set(0), mu**2
    ema = None if settings.ema_decay is None else ema
    scalars = RowScalars(jnp.float32(1e-2), jnp.int32(3), jnp.float32(0.5))
    call = functools.partial(row_update, settings=settings, copy_dtype=copy_dtype)
    want = call(w, g, mu, nu, ema, scalars, implementation="reference")
    got = interpreted(call, w, g, mu, nu, ema, scalars)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(array, np.float32) for array in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-2 if b.dtype == BF16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "d, k, dtype, kind, reason",
    [
        (100, 8, F32, "TPU v5", r"d = 100, the width of w_LD, is not a multiple of 128"),
        (128, 513, F32, "TPU v5", r"k = 513, and the kernel takes 512 at most"),
        (2**15, 8, F32, "TPU v6 lite", r"d = 32768 needs \d+ MiB of vector memory"),
        (128, 8, F32, "TPU v4", r"not of TPU v4"),
    ],
)
def test_what_decode_loss_cannot_run(d, k, dtype, kind, reason):
    shapes = ((4, k), F32), ((4, k), jnp.int32), ((600, d), dtype), ((4, d), dtype)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with dispatch.target("tpu", kind), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(decode_loss, implementation="mosaic_tpu"), *arrays)
