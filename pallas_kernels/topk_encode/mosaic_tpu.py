"""Encoder and exact top-k on TPUs: a matmul that leaves a sketch of every group of latents.

A tile of latents is cut into slices of 128, and the latents in one lane of all slices, of a few
adjacent tiles, are a group: its sketch is elementwise work on slices of the accumulator, between
registers that are there already.

What follows from the sketches is explained in `second_stage`. Here the groups are chosen by one
sort of all, which carries the candidates along: the compiler makes a full sort of a top-k of so
short rows anyway, and a TPU gathers single numbers one by one. Hence groups are large, so that they
are few: a token more or less to redo costs nothing, since any at all cost one block of them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tpu
from pallas_kernels.dispatch import Target
from pallas_kernels.topk_encode import second_stage

_MOST_KEPT = 512
_SIZES = (256, 128, 64, 32, 16, 8)  # latents in a group, preferred first
_MOST_SLICES = 16  # of a tile
_FEW_REDONE, _MOST_REDONE = 2.5e-2, 0.3  # expected share of tokens, for a size and at all
_MOST_GROUPS = 2**15  # whose number shares a word with two positions
_MOST_TOKENS = 1024  # of a tile, by which the weights are read once; with 2048 latents, 25 MiB
_TILE_BYTES = 2048  # of a row of a tile of x or w
_SKETCH_BYTES = 2**26  # of a block of tokens
_ROWS = 32  # of the accumulator that are sketched at a time, in registers


def unsupported(target: Target, x_BD, w_LD, b_L, k: int) -> str | None:
    """Why the call cannot run; None if it can. See `pallas_kernels.dispatch`."""
    refusal = tpu.refusal(target, x_BD=x_BD, w_LD=w_LD, b_L=b_L)
    if refusal is not None:
        return refusal
    n, least = len(w_LD), _SIZES[-1]
    if k > _MOST_KEPT:
        return f"k = {k}, and the kernel takes {_MOST_KEPT} at most"
    if _redone(n, k, least) > _MOST_REDONE:
        return f"k = {k} of n = {n} is so many that most tokens would be selected twice"
    if (groups := _plan(len(x_BD), w_LD, k).groups) > _MOST_GROUPS:
        return f"n = {n} makes {groups} groups, above {_MOST_GROUPS}"
    return None


def topk_encode(x_BD: jax.Array, w_LD: jax.Array, b_L: jax.Array, k: int):
    """See `pallas_kernels.topk_encode.vjp.topk_encode`."""
    if x_BD.dtype != w_LD.dtype:
        x_BD, w_LD = x_BD.astype(jnp.float32), w_LD.astype(jnp.float32)
    plan = _plan(len(x_BD), w_LD, k)
    b_L = b_L.astype(jnp.float32)
    b_L = jnp.where(b_L == 0, 0.0, b_L)  # so that no sum is -0

    def block(x_bD):
        return _select(plan, _sketch(plan, x_bD, w_LD, b_L), k)

    n_tokens, width = x_BD.shape
    rest = plan.blocks * plan.tiles * plan.tokens - n_tokens
    blocks = jnp.pad(x_BD, ((0, rest), (0, 0))).reshape(plan.blocks, -1, width)
    parts = lax.map(block, blocks)
    selected = (part.reshape(-1, *part.shape[2:])[:n_tokens] for part in parts)
    return second_stage.redo(x_BD, w_LD, b_L, *selected)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Sizes of a call.

    Attributes:
      n: latents.
      size: latents in a group.
      tokens: of a tile.
      tiles: of tokens, in a block that is sketched at once.
      blocks: of tokens.
      depth: columns of x and w in a tile.
    """

    n: int
    size: int
    tokens: int
    tiles: int
    blocks: int
    depth: int

    @property
    def slices(self) -> int:
        """Of a tile of latents."""
        return min(self.size, _MOST_SLICES)

    @property
    def latents(self) -> int:
        """Of a tile."""
        return self.slices * tpu.LANES

    @property
    def spread(self) -> int:
        """Tiles over which a group is spread."""
        return self.size // self.slices

    @property
    def latent_tiles(self) -> int:
        return pl.cdiv(self.n, self.latents)

    @property
    def groups(self) -> int:
        return pl.cdiv(self.latent_tiles, self.spread) * tpu.LANES


def _plan(n_tokens: int, w_LD: jax.Array, k: int) -> _Plan:
    n, width = w_LD.shape
    fitting = (g for g in _SIZES if n >= 2 * k * g and _redone(n, k, g) <= _FEW_REDONE)
    size = next(fitting, _SIZES[-1])
    # All tiles of one size, so that little is padded.
    tiles = pl.cdiv(n_tokens, _MOST_TOKENS)
    tokens = tpu.round_up(pl.cdiv(n_tokens, tiles), _ROWS)
    depth = tpu.divisor(width, _TILE_BYTES // w_LD.dtype.itemsize)
    plan = _Plan(n, size, tokens, tiles, 1, depth)
    blocks = pl.cdiv(tiles, max(_SKETCH_BYTES // (16 * plan.groups * tokens), 1))
    return dataclasses.replace(plan, tiles=pl.cdiv(tiles, blocks), blocks=blocks)


def _redone(n: int, k: int, size: int) -> float:
    """Expected triples of kept latents in one group, were latents kept at random."""
    return math.comb(k, 3) * (size / n) ** 2


def _select(plan: _Plan, sketch: second_stage.Sketch, k: int) -> tuple[jax.Array, ...]:
    """As `second_stage.select`, whose gathers a sort replaces."""
    group_BG = lax.broadcasted_iota(jnp.int32, sketch.positions_BG.shape, 1)
    bits = 2 * second_stage.POSITION_BITS
    sorted_BG = lax.sort(
        (-sketch.largest_BG, sketch.second_BG, sketch.positions_BG | (group_BG << bits)),
        num_keys=1,
        is_stable=False,
    )
    negated_BK, second_BK, where_BK = (field[:, :k] for field in sorted_BG)
    next_B = -sorted_BG[0][:, k]  # there are more than k groups where few tokens are redone

    group_BK, position_BK = where_BK >> bits, where_BK & (2**bits - 1)
    lane_BK = lax.rem(group_BK, tpu.LANES)
    start_BK = lax.div(group_BK, tpu.LANES) * (plan.spread * plan.latents) + lane_BK
    positions = (position_BK & (2**second_stage.POSITION_BITS - 1),
                 position_BK >> second_stage.POSITION_BITS)  # fmt: skip
    latents_BC = jnp.concatenate([start_BK + p * tpu.LANES for p in positions], axis=1)
    negated_BC = jnp.concatenate([negated_BK, -second_BK], axis=1)
    negated_BC, latents_BC = lax.sort((negated_BC, latents_BC), num_keys=2, is_stable=False)
    values_BK, indices_BK = -negated_BC[:, :k], latents_BC[:, :k]

    # The third value of a group that was not chosen reaches the least only where groups tie.
    least_B = values_BK[:, -1]
    crowded_B = sketch.third_BG.max(axis=1) >= least_B
    return values_BK, indices_BK, crowded_B | (next_B == least_B)


def _sketch(plan: _Plan, x_bD, w_LD, b_L) -> second_stage.Sketch:
    n_tokens, width = x_bD.shape
    bias_1L = jnp.pad(b_L, (0, plan.latent_tiles * plan.latents - plan.n))[None]
    field = pl.BlockSpec((plan.tokens, tpu.LANES), lambda i, j, d: (i, lax.div(j, plan.spread)))
    shapes = [
        jax.ShapeDtypeStruct((n_tokens, plan.groups), dtype)
        for dtype in (jnp.float32, jnp.float32, jnp.float32, jnp.int32)
    ]
    fields = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(n_tokens // plan.tokens, plan.latent_tiles, width // plan.depth),
        in_specs=[
            pl.BlockSpec((plan.tokens, plan.depth), lambda i, j, d: (i, d)),
            pl.BlockSpec((plan.latents, plan.depth), lambda i, j, d: (j, d)),
            pl.BlockSpec((1, plan.latents), lambda i, j, d: (0, j)),
        ],
        out_specs=[field] * 4,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((plan.tokens, plan.latents), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tpu.VMEM_LIMIT,
        ),
        interpret=dispatch.interpret_params("mosaic_tpu"),
        name="topk_encode_sketch",
    )(x_bD, w_LD, bias_1L)
    return second_stage.Sketch(*fields)


def _kernel(plan: _Plan, x_TC, w_NC, bias_1N, *refs):
    *fields, sum_TN = refs
    tile, step = pl.program_id(1), pl.program_id(2)
    product_TN = lax.dot_general(
        x_TC[...],
        w_NC[...],
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x_TC.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )

    @pl.when(step == 0)
    def _begin():
        sum_TN[...] = product_TN

    @pl.when(step > 0)
    def _continue():
        sum_TN[...] += product_TN

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish():
        @pl.loop(0, plan.tokens // _ROWS)
        def _rows(i):
            rows = pl.ds(pl.multiple_of(i * _ROWS, _ROWS), _ROWS)
            _sketch_rows(plan, tile, sum_TN.at[rows], bias_1N, [field.at[rows] for field in fields])


def _sketch_rows(plan: _Plan, tile, sum_RN, bias_1N, fields):
    """Takes a tile's latents into the sketches of `_ROWS` tokens.

    Until a group's last tile, the largest value of a group that holds NaN is NaN.
    """
    shape = (_ROWS, tpu.LANES)
    turn = lax.rem(tile, plan.spread)
    is_new, is_complete = turn == 0, (turn == plan.spread - 1) | (tile == plan.latent_tiles - 1)
    first, second, third = (jnp.where(is_new, -jnp.inf, field[...]) for field in fields[:3])
    at = jnp.where(is_new, 0, fields[3][...])
    bits = second_stage.POSITION_BITS
    first_at, second_at = at & (2**bits - 1), at >> bits
    has_nan = first != first
    for i in range(plan.slices):
        columns = pl.ds(i * tpu.LANES, tpu.LANES)
        h = sum_RN[:, columns] + bias_1N[:, columns]
        if plan.n % plan.latents:  # what stands for rows of w beyond the last may be anything
            lane = lax.broadcasted_iota(jnp.int32, shape, 1)
            h = jnp.where(lane < plan.n - tile * plan.latents - i * tpu.LANES, h, -jnp.inf)
        has_nan |= h != h
        is_first, is_second = h > first, h > second
        third = jnp.maximum(third, jnp.minimum(second, h))
        second = jnp.maximum(second, jnp.minimum(first, h))
        first = jnp.maximum(first, h)
        position = turn * plan.slices + i
        second_at = jnp.where(is_first, first_at, jnp.where(is_second, position, second_at))
        first_at = jnp.where(is_first, position, first_at)
    fields[0][...] = jnp.where(has_nan, jnp.where(is_complete, jnp.inf, jnp.nan), first)
    fields[1][...] = jnp.where(has_nan, jnp.inf, second)
    fields[2][...] = jnp.where(has_nan, jnp.inf, third)
    fields[3][...] = first_at | (second_at << bits)
