"""Weight gradients on TPUs: one walk over the pairs, sorted by latent, in one order.

The pairs come in chunks that fit the scalar memory, the gradients in blocks of latents that fit the
vector memory. Where a chunk or a block ends a grid step ends, so that a step has one of each. It
copies the rows of its pairs from HBM, a ring of them ahead, and adds them to the rows of its block.
A token's residual and input travel as one row: in bfloat16 they share its words.

One core walks all pairs, so that a long segment takes no longer than as many short ones, and
needs no cutting. Every block has a step, if only to write its zeros.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tpu
from pallas_kernels.dispatch import Target
from pallas_kernels.pair_list.pairs import Pairs

_CHUNK = 2048  # pairs: their four numbers, twice, are 64 KiB of scalar memory
_MOST_STEPS = 2**15  # whose four numbers are 512 KiB of scalar memory
_MOST_LATENTS = 512  # of a block
_BLOCK_BYTES = 24 * 2**20  # of both gradients' blocks and totals, being used and under way
_RING_BYTES = 2**22
_MOST_AHEAD = 64  # rows
_COLUMNS = 512  # of a row that are added at a time, so that they stay in registers


def unsupported(target: Target, values_BK, d_values_BK, indices_BK, e_BD, x_BD, n, *, totals=None):
    """Why the call cannot run; None if it can. See `pallas_kernels.dispatch`."""
    codes = {"values_BK": values_BK, "d_values_BK": d_values_BK}
    refusal = tpu.refusal(target, **codes, e_BD=e_BD, x_BD=x_BD)
    return refusal or _too_large(indices_BK.size, e_BD, x_BD, n, totals)


def unsupported_weight_grads_of_pairs(
    target: Target, pairs: Pairs, d_values_P, e_BD, x_BD, n, *, totals=None
):
    """Why the call cannot run; None if it can. See `pallas_kernels.dispatch`."""
    codes = {"pairs.values_P": pairs.values_P, "d_values_P": d_values_P}
    refusal = tpu.refusal(target, **codes, e_BD=e_BD, x_BD=x_BD)
    return refusal or _too_large(pairs.values_P.size, e_BD, x_BD, n, totals)


def _too_large(n_pairs: int, e_BD, x_BD, n: int, totals) -> str | None:
    plan = _plan(n_pairs, e_BD, x_BD, n)
    if plan.steps > _MOST_STEPS:
        return f"{n_pairs} pairs of {n} latents make {plan.steps} steps, above {_MOST_STEPS}"
    if plan.latents < tpu.SUBLANES or plan.ahead < 2:
        return f"d = {plan.width}, and a few rows do not fit the vector memory"
    if plan.width == tpu.LANES and not _shares_words(e_BD, x_BD):
        return f"d = {plan.width} in float32 is too narrow: see `tpu.spans`"
    if totals is not None and any(total.dtype != jnp.float32 for total in totals):
        return "totals are not float32"
    return None


def weight_grads(values_BK, d_values_BK, indices_BK, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads`."""
    token_BK = lax.broadcasted_iota(jnp.int32, indices_BK.shape, 0)
    # The values travel with their keys: gathering them afterwards is slower on TPUs. The order of
    # two equal pairs, of which a code has none, is the sort's.
    flat = (a.reshape(-1) for a in (indices_BK, token_BK, values_BK, d_values_BK))
    latents_P, tokens_P, values_P, d_values_P = lax.sort(tuple(flat), num_keys=2, is_stable=False)
    pairs = Pairs(values_P, tokens_P, latents_P, jnp.int32(indices_BK.size))
    return weight_grads_of_pairs(pairs, d_values_P, e_BD, x_BD, n, totals=totals)


def weight_grads_of_pairs(pairs: Pairs, d_values_P, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads_of_pairs`."""
    plan = _plan(pairs.values_P.size, e_BD, x_BD, n)
    steps = _steps(plan, pairs.latents_P, pairs.count)
    columns = (pairs.tokens_P, pairs.latents_P, pairs.values_P, d_values_P)
    rest = plan.chunks * _CHUNK - pairs.values_P.size
    chunks = [jnp.pad(column, (0, rest)).reshape(plan.chunks, 1, _CHUNK) for column in columns]
    chunks[2:] = [column.astype(jnp.float32) for column in chunks[2:]]
    rows_BW = _rows(e_BD, x_BD)
    inputs = [*steps, *chunks, rows_BW]
    aliases = {}
    if totals is not None:
        aliases = {len(inputs) + i: i for i in range(3)}
        w_dec_LD, w_enc_LD, bias_L = totals
        bias_L = jnp.pad(bias_L, (0, plan.blocks * plan.latents - n))
        inputs += [w_dec_LD, w_enc_LD, bias_L.reshape(plan.blocks, 1, plan.latents)]
    w_dec_LD, w_enc_LD, bias = pl.pallas_call(
        functools.partial(_kernel, plan, totals is not None),
        grid_spec=_grid_spec(plan, rows_BW, totals is not None),
        out_shape=[
            jax.ShapeDtypeStruct((n, plan.width), jnp.float32),
            jax.ShapeDtypeStruct((n, plan.width), jnp.float32),
            jax.ShapeDtypeStruct((plan.blocks, 1, plan.latents), jnp.float32),
        ],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=tpu.VMEM_LIMIT
        ),
        interpret=dispatch.interpret_params("mosaic_tpu"),
        name="weight_grads",
    )(*inputs)
    return w_dec_LD, w_enc_LD, bias.reshape(-1)[:n]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of a call.

    Attributes:
      width: of the gradients.
      latents: of a block.
      blocks, chunks: how many there are.
      ahead: rows in the ring.
    """

    width: int
    latents: int
    blocks: int
    chunks: int
    ahead: int

    @property
    def steps(self) -> int:
        return self.blocks + self.chunks


def _plan(n_pairs: int, e_BD, x_BD, n: int) -> _Plan:
    width = e_BD.shape[1]
    most = min(_BLOCK_BYTES // (8 * 4 * width), _MOST_LATENTS) // tpu.SUBLANES * tpu.SUBLANES
    latents = min(most, tpu.round_up(n, tpu.SUBLANES))
    words = width if _shares_words(e_BD, x_BD) else 2 * width
    ahead = min(_RING_BYTES // (4 * words), _MOST_AHEAD)
    return _Plan(width, latents, pl.cdiv(n, max(latents, 1)), pl.cdiv(n_pairs, _CHUNK), ahead)


def _shares_words(e_BD, x_BD) -> bool:
    return e_BD.dtype == x_BD.dtype == jnp.bfloat16


def _rows(e_BD, x_BD) -> jax.Array:
    if _shares_words(e_BD, x_BD):
        return tpu.pair_words(e_BD, x_BD)
    return jnp.concatenate([e_BD.astype(jnp.float32), x_BD.astype(jnp.float32)], axis=1)


class _Steps(NamedTuple):
    """What every grid step works on: pairs first <= p < last, all in one chunk and one block."""

    first: jax.Array
    last: jax.Array
    chunk: jax.Array
    block: jax.Array


def _steps(plan: _Plan, latents_P, count) -> _Steps:
    """Cuts the pairs where a chunk begins and where a block does; some steps are empty."""
    first_latents = jnp.arange(plan.blocks, dtype=jnp.int32) * plan.latents
    of_blocks = jnp.searchsorted(latents_P, first_latents, method="scan_unrolled")
    of_chunks = jnp.arange(plan.chunks, dtype=jnp.int32) * _CHUNK
    # Stable, so that a block begins before a chunk does: blocks come first among equals.
    starts = jnp.concatenate([of_blocks.astype(jnp.int32), of_chunks])
    begins_block = (jnp.arange(plan.steps) < plan.blocks).astype(jnp.int32)
    starts, begins_block = lax.sort((starts, begins_block), num_keys=1, is_stable=True)
    first = jnp.minimum(starts, count)
    last = jnp.append(first[1:], count)
    block = jnp.cumsum(begins_block) - 1
    last_chunk = jnp.maximum(count - 1, 0) // _CHUNK  # no others are read
    chunk = jnp.clip(jnp.cumsum(1 - begins_block) - 1, 0, last_chunk)
    return _Steps(*(a.astype(jnp.int32) for a in (first, last, chunk, block)))


def _grid_spec(plan: _Plan, rows_BW, has_totals: bool) -> pltpu.PrefetchScalarGridSpec:
    def chunk(step, first, last, chunk, block):
        return chunk[step], 0, 0

    def block(step, first, last, chunk, block):
        return block[step], 0

    def bias(step, first, last, chunk, block):
        return block[step], 0, 0

    pairs = pl.BlockSpec((1, 1, _CHUNK), chunk, memory_space=pltpu.SMEM)
    sums = [
        pl.BlockSpec((plan.latents, plan.width), block),
        pl.BlockSpec((plan.latents, plan.width), block),
        pl.BlockSpec((1, 1, plan.latents), bias, memory_space=pltpu.SMEM),
    ]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(_Steps._fields),
        grid=(plan.steps,),
        in_specs=[pairs] * 4 + [pl.BlockSpec(memory_space=pl.ANY)] + sums * has_totals,
        out_specs=sums,
        scratch_shapes=[
            pltpu.VMEM((plan.ahead, rows_BW.shape[1]), rows_BW.dtype),
            pltpu.SemaphoreType.DMA((plan.ahead,)),
        ],
    )


def _kernel(plan: _Plan, has_totals: bool, first, last, chunk, block, *refs):
    """One grid step: the pairs of one chunk that are of one block of latents."""
    tokens, latents, values, d_values, rows_BW, *refs = refs
    totals = [refs.pop(0) for _ in range(3)] if has_totals else None
    *sums, ring, arrived = refs
    step = pl.program_id(0)
    is_new = (step == 0) | (block[step] != block[jnp.maximum(step - 1, 0)])
    pl.when(is_new)(functools.partial(_begin, plan, sums, totals))

    count = last[step] - first[step]
    offset = first[step] - chunk[step] * _CHUNK
    first_latent = block[step] * plan.latents
    fetch = functools.partial(_fetch, plan, tokens, rows_BW, ring, arrived, offset)
    pl.loop(0, jnp.minimum(plan.ahead, count))(fetch)

    @pl.loop(0, count)
    def _pair(i):
        _wait(rows_BW, ring, arrived, lax.rem(i, plan.ahead))
        pair = offset + i
        row = latents[0, 0, pair] - first_latent
        coefficients = values[0, 0, pair], d_values[0, 0, pair]
        _add(plan, sums, ring, row, lax.rem(i, plan.ahead), coefficients)
        pl.when(i + plan.ahead < count)(functools.partial(fetch, i + plan.ahead))


def _begin(plan: _Plan, sums, totals):
    for i in range(2):
        sums[i][...] = jnp.zeros_like(sums[i]) if totals is None else totals[i][...]

    @pl.loop(0, plan.latents)
    def _latent(row):
        sums[2][0, 0, row] = 0.0 if totals is None else totals[2][0, 0, row]


def _fetch(plan: _Plan, tokens, rows_BW, ring, arrived, offset, i):
    slot = lax.rem(i, plan.ahead)
    row = pl.ds(tokens[0, 0, offset + i], 1)
    pltpu.make_async_copy(rows_BW.at[row], ring.at[pl.ds(slot, 1)], arrived.at[slot]).start()


def _wait(rows_BW, ring, arrived, slot):
    row = rows_BW.at[pl.ds(0, 1)]  # any row: only the size of the copy counts
    pltpu.make_async_copy(row, ring.at[pl.ds(slot, 1)], arrived.at[slot]).wait()


def _add(plan: _Plan, sums, ring, row, slot, coefficients):
    """Adds one pair to its latent."""
    w_dec_LD, w_enc_LD, bias = sums
    value, d_value = coefficients
    row, slot = pl.ds(row, 1), pl.ds(slot, 1)
    for start, width in tpu.spans(plan.width, _COLUMNS):
        columns = pl.ds(start, width)
        if ring.dtype == jnp.uint32:
            e_1C, x_1C = tpu.halves(ring[slot, columns])
        else:
            e_1C, x_1C = ring[slot, columns], ring[slot, pl.ds(plan.width + start, width)]
        w_dec_LD[row, columns] += value * e_1C
        w_enc_LD[row, columns] += d_value * x_1C
    bias[0, 0, row.start] += d_value
