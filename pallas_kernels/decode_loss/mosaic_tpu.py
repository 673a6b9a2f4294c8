"""Reconstruction error and its gradient on TPUs: one gather of the decoder rows of every token.

A grid step has 128 tokens. The rows of a token are copied one by one from HBM into a slot of a
ring, as many tokens ahead as the ring has slots; both products are then vector operations on
`[K, columns]`, in float32. The tokens lie along lanes in everything with one number a slot: a
column of `[K, 128]` is broadcast along the rows, which a row of `[128, K]` could not be.

`products` also carries out the halves: `dense_sparse_matmul` and `matmul_at_sparse_indices`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tpu
from pallas_kernels.dispatch import Target

_TOKENS = tpu.LANES  # of a grid step
_MOST_KEPT = 512  # two blocks of indices, 128 tokens each, fill half of the scalar memory
_SLOT_BYTES = 2**21  # of the rows of one token; wider rows come in pieces
_ROWS_AHEAD = 128  # copies in flight that hide the latency of one
_COLUMNS = 512  # of a row that are combined at a time, so that they stay in registers


def unsupported(target: Target, values_BK, indices_BK, w_LD, target_BD, *, residual_dtype):
    """Why the call cannot run; None if it can. See `pallas_kernels.dispatch`."""
    if jnp.dtype(residual_dtype) not in (jnp.float32, jnp.bfloat16):
        return f"residual_dtype is {jnp.dtype(residual_dtype)}; the kernel writes 32 or 16 bits"
    return tpu.refusal(target, values_BK=values_BK, w_LD=w_LD, target_BD=target_BD) or no_products(
        indices_BK, w_LD, residual_dtype
    )


def decode_loss(values_BK, indices_BK, w_LD, target_BD, *, residual_dtype: jnp.dtype):
    """See `pallas_kernels.decode_loss.api.decode_loss`."""
    return products(values_BK, indices_BK, w_LD, target_BD, out_dtype=residual_dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of a call, and which of the products it makes.

    Attributes:
      tokens, k: of the call.
      words: 32-bit words of a row that a copy moves.
      pieces: copies that make a row.
      slots: of the ring.
      decodes: values are given, so that `sum_j values_j * row_j` is made.
      compares: a target or a factor is given, so that its inner products with the rows are made.
    """

    tokens: int
    k: int
    words: int
    pieces: int
    slots: int
    decodes: bool
    compares: bool

    @property
    def k_padded(self) -> int:
        return tpu.round_up(self.k, tpu.SUBLANES)


def _plan(indices_BK, n_words: int, decodes: bool, compares: bool) -> _Plan:
    tokens, k = indices_BK.shape
    k_padded = tpu.round_up(k, tpu.SUBLANES)
    words = tpu.divisor(n_words, _SLOT_BYTES // (4 * k_padded))
    slots = min(max(_ROWS_AHEAD // k_padded, 2), 16)
    return _Plan(tokens, k, words, n_words // words, slots, decodes, compares)


def no_products(indices_BK, w_LD, dtype) -> str | None:
    """Why `products` cannot take arrays of these sizes; None if it can."""
    k, width = indices_BK.shape[1], w_LD.shape[1]
    if 0 in indices_BK.shape:
        return f"indices_BK of shape {list(indices_BK.shape)} is empty"
    if k > _MOST_KEPT:
        return f"k = {k}, and the kernel takes {_MOST_KEPT} at most"
    plan = _plan(indices_BK, width, True, True)
    blocks = _TOKENS * width * (4 + 4 * jnp.dtype(dtype).itemsize)
    need = blocks + plan.slots * plan.k_padded * plan.words * 4 + 2**22
    if need > tpu.VMEM_LIMIT:
        return f"d = {width} needs {need >> 20} MiB of vector memory, above {tpu.VMEM_LIMIT >> 20}"
    return None


def products(values_BK, indices_BK, w_LD, a_BD, *, out_dtype) -> tuple[jax.Array, ...]:
    """Products of sparse codes with the rows they name, from one gather.

    Args:
      values_BK: `[B, K]`, or None.
      indices_BK: `[B, K]` int32 in [0, L).
      w_LD: `[L, D]`.
      a_BD: `[B, D]`, or None.
      out_dtype: of what is `[B, D]`.

    Returns:
      With values and a: the residual `a - values @ rows` `[B, D]`, its inner products with the rows
      `[B, K]`, its squared norm `[B]`. With values alone: `values @ rows` `[B, D]`. With a alone:
      its inner products with the rows `[B, K]`. All but the first in float32.
    """
    tokens, k = indices_BK.shape
    words_LW = tpu.row_words(w_LD)
    plan = _plan(indices_BK, words_LW.shape[1], values_BK is not None, a_BD is not None)
    blocks = pl.cdiv(tokens, _TOKENS)
    pad = blocks * _TOKENS - tokens
    inputs = [_slot_by_slot(jnp.pad(indices_BK, ((0, pad), (0, 0)))), words_LW]
    if plan.decodes:
        rest = ((0, plan.k_padded - k), (0, pad))
        inputs.append(jnp.pad(values_BK.astype(jnp.float32).T, rest))
    if plan.compares:
        inputs.append(a_BD)
    outs = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(blocks,),
        in_specs=_in_specs(plan, w_LD.shape[1]),
        out_specs=_out_specs(plan, w_LD.shape[1]),
        out_shape=_out_shapes(plan, w_LD.shape[1], out_dtype),
        scratch_shapes=[
            pltpu.VMEM((_TOKENS, w_LD.shape[1]), jnp.float32),
            pltpu.VMEM((plan.slots, plan.k_padded, plan.words), words_LW.dtype),
            pltpu.SemaphoreType.DMA((plan.slots,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tpu.VMEM_LIMIT
        ),
        interpret=dispatch.interpret_params("mosaic_tpu"),
        name="gathered_products",
    )(*inputs)
    outs = list(outs)
    rows = [outs.pop(0)] if plan.decodes else []
    inner = [outs.pop(0)[:k, :tokens].T] if plan.compares else []
    return *rows, *inner, *(error_1B[0, :tokens] for error_1B in outs)


def _slot_by_slot(indices_BK: jax.Array) -> jax.Array:
    """`[blocks, 1, K * 128]`: of each block the first slot of all its tokens, then the second, ...

    Never `[B, K]` with the slots along lanes, of which they would fill few: XLA made such a copy to
    put the slots of a token next to each other.
    """
    tokens, k = indices_BK.shape
    by_block = indices_BK.T.reshape(k, tokens // _TOKENS, _TOKENS).swapaxes(0, 1)
    return by_block.reshape(-1, 1, k * _TOKENS)


def _in_specs(plan: _Plan, width: int) -> list[pl.BlockSpec]:
    specs = [
        pl.BlockSpec((1, 1, _TOKENS * plan.k), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    if plan.decodes:
        specs.append(pl.BlockSpec((plan.k_padded, _TOKENS), lambda i: (0, i)))
    if plan.compares:
        specs.append(pl.BlockSpec((_TOKENS, width), lambda i: (i, 0)))
    return specs


def _out_specs(plan: _Plan, width: int) -> list[pl.BlockSpec]:
    specs = []
    if plan.decodes:
        specs.append(pl.BlockSpec((_TOKENS, width), lambda i: (i, 0)))
    if plan.compares:
        specs.append(pl.BlockSpec((plan.k_padded, _TOKENS), lambda i: (0, i)))
    if plan.decodes and plan.compares:
        specs.append(pl.BlockSpec((1, _TOKENS), lambda i: (0, i)))
    return specs


def _out_shapes(plan: _Plan, width: int, out_dtype) -> list[jax.ShapeDtypeStruct]:
    padded, shapes = tpu.round_up(plan.tokens, _TOKENS), []
    if plan.decodes:
        shapes.append(jax.ShapeDtypeStruct((plan.tokens, width), out_dtype))
    if plan.compares:
        shapes.append(jax.ShapeDtypeStruct((plan.k_padded, padded), jnp.float32))
    if plan.decodes and plan.compares:
        shapes.append(jax.ShapeDtypeStruct((1, padded), jnp.float32))
    return shapes


def _kernel(plan: _Plan, indices, words_LW, *refs):
    """One block of tokens. `rows_TD` holds the target's rows, then what is written."""
    refs = list(refs)
    values_KT = refs.pop(0) if plan.decodes else None
    a_TD = refs.pop(0) if plan.compares else None
    out_TD = refs.pop(0) if plan.decodes else None
    inner_KT = refs.pop(0) if plan.compares else None
    error_1T = refs.pop(0) if plan.decodes and plan.compares else None
    rows_TD, ring, arrived = refs
    for ref in (inner_KT, error_1T):
        if ref is not None:
            ref[...] = jnp.zeros_like(ref)
    if plan.compares:
        rows_TD[...] = a_TD[...].astype(jnp.float32)

    # The last block may have fewer tokens.
    here = jnp.minimum(plan.tokens - pl.program_id(0) * _TOKENS, _TOKENS)
    fetch = functools.partial(_fetch, plan, indices, words_LW, ring, arrived)
    for unit in range(plan.slots):
        pl.when(unit < here * plan.pieces)(functools.partial(fetch, unit))

    @pl.loop(0, here)
    def _token(t):
        is_token_1T = lax.broadcasted_iota(jnp.int32, (1, _TOKENS), 1) == t
        value_K1 = _column(values_KT[...], is_token_1T) if plan.decodes else None
        inner_K1, error_11 = 0.0, 0.0
        for piece in range(plan.pieces):
            unit = t * plan.pieces + piece
            slot = lax.rem(unit, plan.slots)
            _wait(plan, ring, arrived, slot)
            inner, error = _combine(plan, ring.at[slot], rows_TD, t, piece, value_K1)
            inner_K1, error_11 = inner_K1 + inner, error_11 + error
            ahead = unit + plan.slots
            pl.when(ahead < here * plan.pieces)(functools.partial(fetch, ahead))
        for ref, value in ((inner_KT, inner_K1), (error_1T, error_11)):
            if ref is not None:
                ref[...] = jnp.where(is_token_1T, value, ref[...])

    if plan.decodes:
        out_TD[...] = rows_TD[...].astype(out_TD.dtype)


def _column(values_KT, is_token_1T):
    return jnp.where(is_token_1T, values_KT, 0.0).sum(1, keepdims=True)


def _fetch(plan: _Plan, indices, words_LW, ring, arrived, unit):
    """Starts the copies of one piece of the rows of one token."""
    token, piece = lax.div(unit, plan.pieces), lax.rem(unit, plan.pieces)
    slot = lax.rem(unit, plan.slots)
    columns = pl.ds(pl.multiple_of(piece * plan.words, tpu.LANES), plan.words)

    @pl.loop(0, plan.k)
    def _row(j):
        row = pl.ds(indices[0, 0, j * _TOKENS + token], 1)
        pltpu.make_async_copy(
            words_LW.at[row, columns], ring.at[slot, pl.ds(j, 1)], arrived.at[slot]
        ).start()


def _wait(plan: _Plan, ring, arrived, slot):
    """Waits for all rows of a slot: only the sizes of these copies count."""
    full = plan.k // tpu.SUBLANES * tpu.SUBLANES  # the rest of a tile can be named row by row
    for first, count in ((0, full), *((row, 1) for row in range(full, plan.k))):
        if count:
            rows = ring.at[slot, pl.ds(first, count)]
            pltpu.make_async_copy(rows, rows, arrived.at[slot]).wait()


def _combine(plan: _Plan, words_KW, rows_TD, t, piece: int, value_K1):
    """Products of one piece: what is `[1, D]` goes to `rows_TD`, the others are returned."""
    inner_K1, error_11 = 0.0, 0.0
    halves = 1 if words_KW.dtype == jnp.float32 else 2
    width = rows_TD.shape[1] // halves
    for first, columns in tpu.spans(plan.words, _COLUMNS):
        for half, part_KC in enumerate(tpu.halves(words_KW[:, first : first + columns])):
            if plan.k < plan.k_padded:  # the rest of the slot was never written
                is_row = lax.broadcasted_iota(jnp.int32, part_KC.shape, 0) < plan.k
                part_KC = jnp.where(is_row, part_KC, 0.0)
            start = half * width + piece * plan.words + first
            where = (pl.ds(t, 1), pl.ds(start, columns))
            row_1C = rows_TD[where] if plan.compares else None
            if plan.decodes:
                sum_1C = (value_K1 * part_KC).sum(0, keepdims=True)
                row_1C = row_1C - sum_1C if plan.compares else sum_1C
                rows_TD[where] = row_1C
            if plan.compares:
                inner_K1 += (row_1C * part_KC).sum(1, keepdims=True)
                error_11 += (row_1C * row_1C).sum(1, keepdims=True)
    return inner_K1, error_11
