"""Encoder matmul on Hopper GPUs that leaves a sketch of every group of latents.

Persistent blocks work in pairs (clusters of two). In each block one warpgroup fetches and two
multiply, each its own tiles (128 tokens by 128 latents) from its own ring of buffers. The fetching
one serves them tile by tile in turn, so that one sketches while the other keeps the tensor cores
busy. The two blocks of a pair take the same latents and adjacent tokens: each fetches half of the
weights' tile for both.

A group is made of the columns of a tile that agree modulo 8, over a few adjacent tiles: with the
accumulator's layout in registers one thread then updates a group, without exchange.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.topk_encode import second_stage
from pallas_kernels.topk_encode.second_stage import Sketch

_TILE_TOKENS = 128  # of one warpgroup
_TILE_LATENTS = 128
_TILE_D = 64  # 128 bytes: one swizzle
_COLUMNS = 8  # groups that a tile begins; the accumulator's layout allows no fewer
_SLOTS = 3  # buffers of each multiplying warpgroup
_WARPGROUPS = 2  # that multiply
_PAIR = 2  # blocks of a cluster
_TOKENS = _PAIR * _TILE_TOKENS  # that a pair takes at once
_FETCH_REGISTERS, _MULTIPLY_REGISTERS = 40, 232
_SNAKE = 8  # adjacent sets of groups that are swept together over the tokens, for the cache's sake

# (adjacent tiles that share groups, expected share of tokens that need the fallback, at most): the
# larger the groups, the smaller the sketch, and the more tokens are redone, at several times the
# cost.
_CHOICES = ((4, 0.01), (2, 0.01), (1, 0.1))

_MAX_K = 512
_SKETCH_BYTES = 2**29  # of one block of tokens
_GROUP_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Layout:
    """How latents are grouped, and over how many blocks the work is spread.

    Attributes:
      tiles: adjacent tiles of latents that share a set of groups.
      pairs: of persistent blocks.
    """

    tiles: int
    pairs: int

    @property
    def latents(self) -> int:
        """That share a set of groups; what the number of latents must be a multiple of."""
        return _TILE_LATENTS * self.tiles

    @property
    def group_size(self) -> int:
        return self.latents // _COLUMNS

    def latent_of(self, group: jax.Array, position: jax.Array) -> jax.Array:
        """See `second_stage.LatentOf`."""
        return group // _COLUMNS * self.latents + position * _COLUMNS + group % _COLUMNS


def unsettled_share(n: int, k: int, group_size: int) -> float:
    """Share of tokens with three of the top k in one group, if these fall at random."""
    return k**3 * group_size**2 / (6 * n**2)


def unsupported(target: dispatch.Target, x_BD, w_LD, b_L, k: int) -> str | None:
    """Why this kernel cannot carry out a call; None if it can."""
    del target, b_L
    n, d_model = w_LD.shape
    dtypes = {jnp.dtype(x_BD.dtype).name, jnp.dtype(w_LD.dtype).name}
    if "float32" in dtypes:
        return "float32 operands would be rounded to tf32; pass x_BD and w_LD as bfloat16"
    if dtypes != {"bfloat16"}:
        return f"x_BD and w_LD must be bfloat16, and are {' and '.join(sorted(dtypes))}"
    if d_model % _TILE_D:
        return f"D = {d_model} must be a multiple of {_TILE_D}"
    if not len(x_BD):
        return "there are no tokens"
    if k > _MAX_K:
        return f"k = {k} must be at most {_MAX_K}"
    if _tiles(n, k) is None:
        size = Layout(1, 1).group_size
        return (
            f"k = {k} is too many of {n} latents: in groups of {size}, there must be at least k, "
            f"and three of the k would meet in one for {unsettled_share(n, k, size):.0%} of the "
            f"tokens (at most {_CHOICES[-1][1]:.0%})"
        )
    return None


def topk_encode(x_BD: jax.Array, w_LD: jax.Array, b_L: jax.Array, k: int):
    """See `pallas_kernels.topk_encode.vjp.topk_encode`."""
    layout = Layout(_tiles(len(w_LD), k), _pairs(dispatch.current_target().device_kind))
    n_padded = pl.cdiv(len(w_LD), layout.latents) * layout.latents
    padded_LD = jnp.pad(w_LD, ((0, n_padded - len(w_LD)), (0, 0)))

    def sketch(x_bD, b_L):
        b_L = jnp.pad(b_L, (0, n_padded - len(b_L)), constant_values=-jnp.inf)
        return sketch_groups(x_bD, padded_LD, b_L, layout)

    bytes_per_token = n_padded // layout.group_size * _GROUP_BYTES
    blocks = pl.cdiv(len(x_BD), max(_SKETCH_BYTES // bytes_per_token, _TOKENS))
    return second_stage.encode(
        x_BD,
        w_LD,
        b_L,
        k,
        sketch=sketch,
        latent_of=layout.latent_of,
        tokens_per_block=pl.cdiv(len(x_BD), blocks * _TOKENS) * _TOKENS,
    )


def sketch_groups(x_BD: jax.Array, w_LD: jax.Array, b_L: jax.Array, layout: Layout) -> Sketch:
    """The sketch of `x @ w.T + b`.

    Args:
      x_BD: `[B, D]` bfloat16, B a multiple of 256 and D of 64.
      w_LD: `[L, D]` bfloat16, L a multiple of `layout.latents`.
      b_L: `[L]` float32.
      layout: of the groups and the work.
    """
    shape = (len(x_BD), len(w_LD) // layout.group_size)
    values, positions = (jax.ShapeDtypeStruct(shape, d) for d in (jnp.float32, jnp.int32))
    pieces = len(x_BD) // _TOKENS * (len(w_LD) // layout.latents)
    layout = dataclasses.replace(layout, pairs=min(layout.pairs, pl.cdiv(pieces, _WARPGROUPS)))
    swizzled = (plgpu.TilingTransform((8, _TILE_D)), plgpu.SwizzleTransform(2 * _TILE_D))
    slots = _WARPGROUPS * _SLOTS
    kernel = plgpu.kernel(
        functools.partial(_kernel, layout),
        out_type=(values, values, values, positions),
        scratch_types=(
            plgpu.SMEM((slots, _TILE_TOKENS, _TILE_D), x_BD.dtype, transforms=swizzled),
            plgpu.SMEM((slots, _TILE_LATENTS, _TILE_D), w_LD.dtype, transforms=swizzled),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            # Either block's fetch of weights fills a slot of both: both must have used it up.
            plgpu.ClusterBarrier(collective_axes=("block",), num_barriers=slots),
        ),
        grid=(layout.pairs,),
        grid_names=("pair",),
        cluster=(_PAIR,),
        cluster_names=("block",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="topk_encode",
        interpret=dispatch.interpret_params("mosaic_gpu"),
    )
    return Sketch(*kernel(x_BD, w_LD, b_L))


@dataclasses.dataclass(frozen=True)
class _Work:
    """Which pieces of work (tokens of a pair by latents of one set of groups) are whose.

    Attributes:
      layout: of the groups and blocks.
      shape: pieces along tokens and along latents.
      steps: slices of D in one tile.
    """

    layout: Layout
    shape: tuple[int, int]
    steps: int

    def pieces(self, warpgroup) -> jax.Array:
        """How many pieces a multiplying warpgroup of this block has."""
        stride = self.layout.pairs * _WARPGROUPS
        rest = self.shape[0] * self.shape[1] - self._first(warpgroup)
        return lax.div(rest + (stride - 1), stride)

    def place(self, warpgroup, piece) -> tuple[jax.Array, jax.Array]:
        """This block's first token, and the first latent, of a warpgroup's piece."""
        number = self._first(warpgroup) + piece * (self.layout.pairs * _WARPGROUPS)
        row, column = plgpu.planar_snake(number, self.shape, 1, _SNAKE)
        token = (row * _PAIR + lax.axis_index("block")) * _TILE_TOKENS
        return token, column * self.layout.latents

    def slot(self, warpgroup, step) -> jax.Array:
        """Buffer of a warpgroup's step, counted from the kernel's start."""
        return warpgroup * _SLOTS + lax.rem(step, _SLOTS)

    def _first(self, warpgroup) -> jax.Array:
        return lax.axis_index("pair") * _WARPGROUPS + warpgroup


def _kernel(layout, x_gmem, w_gmem, b_gmem, *refs):
    """Every warpgroup of every block runs this."""
    *outputs, x_smem, w_smem, full, empty = refs
    shape = x_gmem.shape[0] // _TOKENS, w_gmem.shape[0] // layout.latents
    work = _Work(layout, shape, x_gmem.shape[1] // _TILE_D)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
        _multiply(work, warpgroup, b_gmem, outputs, x_smem, w_smem, full, empty)

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
        _fetch(work, x_gmem, w_gmem, x_smem, w_smem, full, empty)


def _fetch(work, x_gmem, w_gmem, x_smem, w_smem, full, empty):
    """Fills the rings of the multiplying warpgroups, a tile for one, a tile for the other."""

    def tile(warpgroup, piece, number):
        token, latent = work.place(warpgroup, piece)
        x_tile = x_gmem.at[pl.ds(token, _TILE_TOKENS)]
        w_tile = w_gmem.at[pl.ds(latent + number * _TILE_LATENTS, _TILE_LATENTS)]

        @pl.loop(0, work.steps)
        def _(step):
            total = (piece * work.layout.tiles + number) * work.steps + step
            slot = work.slot(warpgroup, total)

            @pl.when(total >= _SLOTS)
            def _():
                plgpu.barrier_wait(empty.at[slot])

            d = pl.ds(step * _TILE_D, _TILE_D)
            plgpu.copy_gmem_to_smem(x_tile.at[:, d], x_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(
                w_tile.at[:, d], w_smem.at[slot], full.at[slot], collective_axes="block"
            )

    @pl.loop(0, work.pieces(0))
    def _(piece):
        @pl.loop(0, work.layout.tiles * _WARPGROUPS)
        def _(turn):
            warpgroup = lax.rem(turn, _WARPGROUPS)

            @pl.when(piece < work.pieces(warpgroup))
            def _():
                tile(warpgroup, piece, lax.div(turn, _WARPGROUPS))

    # A block must outlive what the other of its pair sends it.
    for warpgroup in range(_WARPGROUPS):
        total = work.pieces(warpgroup) * (work.layout.tiles * work.steps)
        for slot in range(_SLOTS):

            @pl.when(total > slot)
            def _(slot=warpgroup * _SLOTS + slot):
                plgpu.barrier_wait(empty.at[slot])


def _multiply(work, warpgroup, b_gmem, outputs, x_smem, w_smem, full, empty):
    """Sums up and sketches this warpgroup's pieces."""

    def sums(first, sums_ref):
        @pl.loop(0, work.steps)
        def _(step):
            slot = work.slot(warpgroup, first + step)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(sums_ref, x_smem.at[slot], w_smem.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)  # of this step and the one before, the latter is done

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(empty.at[work.slot(warpgroup, first + step - 1)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[work.slot(warpgroup, first + work.steps - 1)])
        return sums_ref[...]

    @pl.loop(0, work.pieces(warpgroup))
    def _(piece):
        token, latent = work.place(warpgroup, piece)

        def tile(number, kept):
            first = (piece * work.layout.tiles + number) * work.steps
            accumulator = plgpu.ACC((_TILE_TOKENS, _TILE_LATENTS), jnp.float32)
            h = pl.run_scoped(functools.partial(sums, first), accumulator)
            columns = pl.ds(latent + number * _TILE_LATENTS, _TILE_LATENTS)
            bias = plgpu.load(
                b_gmem.at[columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
            )
            return _insert(h + lax.broadcast_in_dim(bias, h.shape, (1,)), number, kept)

        kept = lax.fori_loop(0, work.layout.tiles, tile, _nothing())
        group = lax.div(latent, work.layout.latents) * _COLUMNS
        for output, field in zip(outputs, _finish(*kept), strict=True):
            block = output.at[pl.ds(token, _TILE_TOKENS), pl.ds(group, _COLUMNS)]
            plgpu.store(block, field, optimized=False)


def _nothing():
    """The three largest values of no latents, and positions of the first two."""

    def full(value, dtype):
        array = jnp.full((_TILE_TOKENS, _COLUMNS), value, dtype)
        return plgpu.layout_cast(array, plgpu.Layout.WGMMA)

    return (*(full(-jnp.inf, jnp.float32) for _ in range(3)), *(full(0, jnp.int32),) * 2)


def _insert(h, number, kept):
    """Adds the latents of a tile to their groups; equal values stay in the order they came in."""
    largest, second, third, at, second_at = kept
    for index in range(_TILE_LATENTS // _COLUMNS):
        new = h[:, index * _COLUMNS : (index + 1) * _COLUMNS]
        position = number * (_TILE_LATENTS // _COLUMNS) + index
        above = new > largest
        second_at = jnp.where(above, at, jnp.where(new > second, position, second_at))
        at = jnp.where(above, position, at)
        third = jnp.maximum(third, jnp.minimum(second, new))
        second = jnp.maximum(second, jnp.minimum(largest, new))
        largest = jnp.maximum(largest, new)  # stays NaN once it is
    return largest, second, third, at, second_at


def _finish(largest, second, third, at, second_at):
    is_nan = largest != largest
    values = (jnp.where(is_nan, jnp.inf, v) for v in (largest, second, third))
    return *values, at + second_at * 2**second_stage.POSITION_BITS


def _tiles(n: int, k: int) -> int | None:
    """The most tiles to a set of groups that leave few tokens to the fallback, or None."""
    for tiles, share in _CHOICES:
        size = Layout(tiles, 1).group_size
        if n // size >= k and unsettled_share(n, k, size) <= share:
            return tiles
    return None


def _pairs(device_kind: str) -> int:
    """Pairs of persistent blocks: a block to a streaming multiprocessor."""
    if "PCIe" in device_kind:
        return 114 // _PAIR
    return (78 if device_kind.endswith("H20") else 132) // _PAIR
