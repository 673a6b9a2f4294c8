"""Weight gradients on Hopper GPUs: per latent one ordered pass over its pairs.

The pairs are sorted by (latent, token). A block of one warpgroup owns a few latents and, of wide
rows, one slice; for every pair it reads the token's row and adds it, scaled, to float32 registers.
Every row of the result is written, so that nothing needs to be cleared; there are no atomics, and
the same bits come out on every run. Segments that are too long are summed in pieces first.

Each of the two matrices has a launch of its own: half the registers, so that more blocks are
resident and hide the latency of their reads. A matrix costs `P * D` entries read and `L * D`
written, and float32 `[E, D]` memory for the sums of pieces, E <= 2 P / 512.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu_rows
from pallas_kernels.weight_grads import segments as segments_lib

_ROWS_PER_BLOCK = 4  # latents of a block: amortises its start, leaves many to balance the load
_WIDEST = 2048  # entries of a row in one block: 16 registers of sums to a thread
_AHEAD_BYTES = 16384  # of rows that are on their way before the first of them is added


class Source(NamedTuple):
    """What the sums of segments are made of: arrays, or inside a kernel references to them.

    Attributes:
      coefficients_P: float32.
      tokens_P: int32.
      rows_BD: float32 or bfloat16.
      starts_L, ends_L: int32, see `segments.Segments`.
      piece_offsets: int32 `[L + 1]`; None where there are no pieces, as the sums of pieces
        `piece_rows_ED` and `piece_coefficients_E`.
    """

    coefficients_P: Any
    tokens_P: Any
    rows_BD: Any
    starts_L: Any
    ends_L: Any
    piece_offsets: Any = None
    piece_rows_ED: Any = None
    piece_coefficients_E: Any = None


def unsupported(target, values_BK, d_values_BK, indices_BK, e_BD, x_BD, n, *, totals=None):
    """See `pallas_kernels.dispatch`."""
    del target, indices_BK, n
    return _unsupported(values_BK, d_values_BK, e_BD, x_BD, totals)


def unsupported_weight_grads_of_pairs(target, pairs, d_values_P, e_BD, x_BD, n, *, totals=None):
    """See `pallas_kernels.dispatch`."""
    del target, n
    return _unsupported(pairs.values_P, d_values_P, e_BD, x_BD, totals)


def _unsupported(values, d_values, e_BD, x_BD, totals) -> str | None:
    if totals is not None and any(total.dtype != jnp.float32 for total in totals):
        return "it adds to float32 totals only"
    return gpu_rows.unsupported(values=values, d_values=d_values, e_BD=e_BD, x_BD=x_BD)


def weight_grads(values_BK, d_values_BK, indices_BK, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads`."""
    pairs = segments_lib.sort_pairs(indices_BK)
    sorted_P = (a.reshape(-1)[pairs.order_P] for a in (values_BK, d_values_BK))
    return _of_sorted(*sorted_P, pairs.tokens_P, pairs.latents_P, e_BD, x_BD, n, totals)


def weight_grads_of_pairs(pairs, d_values_P, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads_of_pairs`."""
    where = (pairs.tokens_P, pairs.latents_P)
    return _of_sorted(pairs.values_P, d_values_P, *where, e_BD, x_BD, n, totals)


def _of_sorted(values_P, d_values_P, tokens_P, latents_P, e_BD, x_BD, n: int, totals):
    cut = segments_lib.segments(latents_P, n)
    w_dec_LD, w_enc_LD, bias_L = totals or (None, None, None)
    w_dec_LD, _ = segment_sums(source(values_P, tokens_P, e_BD, cut), w_dec_LD)
    w_enc_LD, sums_L = segment_sums(source(d_values_P, tokens_P, x_BD, cut), w_enc_LD)
    return w_dec_LD, w_enc_LD, sums_L if bias_L is None else bias_L + sums_L


def source(coefficients_P, tokens_P, rows_BD, cut: segments_lib.Segments) -> Source:
    """Sums the pieces of long segments, if there can be any, and puts all together."""
    pairs = (coefficients_P.astype(jnp.float32), tokens_P, rows_BD)
    if not len(cut.piece_starts_E):
        return Source(*pairs, cut.starts_L, cut.ends_L)
    pieces = segment_sums(Source(*pairs, cut.piece_starts_E, cut.piece_ends_E))
    return Source(*pairs, cut.starts_L, cut.ends_L, cut.piece_offsets, *pieces)


def segment_sums(
    given: Source, totals_LD: jax.Array | None = None, dtype=jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Of every segment the sum of `coefficients[p] * rows[tokens[p]]`, and of the coefficients.

    Args:
      given: arrays.
      totals_LD: float32 sums to add to, in place if the caller gives them up.
      dtype: of the sums of rows.

    Returns:
      `[L, D]` and float32 `[L]`.
    """
    (n,), (tokens, d) = given.starts_L.shape, given.rows_BD.shape
    if 0 in (n, tokens, d, len(given.tokens_P)):
        zeros_LD = jnp.zeros((n, d), dtype)
        return zeros_LD if totals_LD is None else totals_LD, jnp.zeros(n, jnp.float32)
    width = gpu_rows.slice_width(d, _WIDEST)
    groups = -(-n // _ROWS_PER_BLOCK)

    def sum_segments(given, totals, *results):
        *sums, coefficients_L = results
        block = lax.axis_index("block")
        start = lax.div(block, groups) * width

        def one(latent):
            row, coefficient = sum_row(given, latent, start, width)
            if totals is not None:
                old = gpu_rows.load(totals, latent, start, width)
                row = tuple(a + b for a, b in zip(old, row, strict=True))
            gpu_rows.store(sums[0] if sums else totals, latent, start, row)

            @pl.when(start == 0)
            def _():
                coefficients_L[latent] = coefficient

        gpu_rows.for_rows_of_block(one, n, lax.rem(block, groups), _ROWS_PER_BLOCK)

    out_type = [jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((n,), jnp.float32)]
    if totals_LD is None:
        run = gpu_rows.kernel(sum_segments, out_type, groups * (d // width))
        return tuple(run(given, None))
    total_ref = jax.new_ref(totals_LD)
    run = gpu_rows.kernel(sum_segments, out_type[1:], groups * (d // width))
    (coefficients_L,) = run(given, total_ref)
    return jax.freeze(total_ref), coefficients_L


def sum_row(given: Source, latent, start, width: int) -> tuple[gpu_rows.Row, jax.Array]:
    """One row of `segment_sums`, of which `[start, start + width)`, inside a kernel.

    Args:
      given: references.
      latent: int32, which row.
      start: int32, first entry of the slice.
      width: entries of the slice.

    Returns:
      The float32 sum of rows and the float32 sum of coefficients.
    """

    def add(first, count, i, total):
        # All reads first: they are on their way together.
        pairs = [first + i * count + j for j in range(count)]
        coefficients = [given.coefficients_P[p] for p in pairs]
        rows = [gpu_rows.load(given.rows_BD, given.tokens_P[p], start, width) for p in pairs]
        acc, coefficient = total
        for c, row in zip(coefficients, rows, strict=True):
            acc = tuple(a + c * b.astype(jnp.float32) for a, b in zip(acc, row, strict=True))
            coefficient = coefficient + c
        return acc, coefficient

    row_bytes = width * jnp.dtype(given.rows_BD.dtype).itemsize
    most = max(1, min(8, _AHEAD_BYTES // row_bytes))
    ahead = 1 << (most.bit_length() - 1)
    first, end = given.starts_L[latent], given.ends_L[latent]
    total = (gpu_rows.zeros(width), jnp.float32(0))
    # As often as it fits, then for what is left half as many at once, a quarter, down to one.
    while ahead:
        times = lax.div(end - first, ahead)
        total = lax.fori_loop(0, times, functools.partial(add, first, ahead), total)
        first, ahead = first + times * ahead, ahead // 2
    if given.piece_offsets is None:
        return total

    def add_piece(e, total):
        row = gpu_rows.load(given.piece_rows_ED, e, start, width)
        acc = tuple(a + b for a, b in zip(total[0], row, strict=True))
        return acc, total[1] + given.piece_coefficients_E[e]

    pieces = (given.piece_offsets[latent], given.piece_offsets[latent + 1])
    return lax.fori_loop(*pieces, add_piece, total)
