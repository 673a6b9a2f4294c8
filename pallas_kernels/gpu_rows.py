"""Rows of matrices in the registers of a Hopper GPU's warpgroup, for Pallas Mosaic GPU kernels.

A warpgroup (128 threads) holds a row as a tuple of chunks, each spread over all its threads with
neighbouring entries in neighbouring threads, up to four to a thread: a float32 chunk moves in
16-byte accesses, a bfloat16 one in 8-byte accesses.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch

LANES = 128  # threads of a warpgroup; the rows' lengths are multiples of it
_WIDEST = 4 * LANES
_DTYPES = ("float32", "bfloat16")

Row = tuple[jax.Array, ...]


def unsupported(**arrays: jax.Array | None) -> str | None:
    """Why kernels cannot take these arrays; None if they can.

    Args:
      **arrays: by the name to call them; the last dimension of matrices is checked as the rows'.
    """
    for name, array in arrays.items():
        if array is None:
            continue
        if jnp.dtype(array.dtype).name not in _DTYPES:
            return f"{name} has dtype {jnp.dtype(array.dtype).name}, and it takes {_DTYPES}"
        if len(array.shape) == 2 and name.endswith("D") and array.shape[1] % LANES:
            return f"{name} has rows of {array.shape[1]}, and it takes multiples of {LANES}"
    return None


def kernel(
    body: Callable[..., None],
    out_type: Sequence[jax.ShapeDtypeStruct],
    blocks: int,
    scratch_types: Sequence[Any] = (),
) -> Callable[..., Any]:
    """A kernel of independent blocks of one warpgroup each; `lax.axis_index("block")` is theirs.

    No barrier surrounds a store, so that reads are not held up by earlier writes: an entry is read
    and written by one thread alone, or the body calls `plgpu.commit_smem` in between.

    Args:
      body: gets references to operands, results and scratch, in this order.
      out_type: of the results.
      blocks: how many there are.
      scratch_types: see `plgpu.kernel`.
    """
    run = plgpu.kernel(
        body,
        out_type=list(out_type),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=scratch_types,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=dispatch.interpret_params("mosaic_gpu"),
    )

    def call(*operands):
        with jax.enable_x64(False):  # indices within kernels have 32 bits, whatever the caller's
            return run(*operands)

    return call


def for_rows_of_block(body: Callable[[jax.Array], None], n: int, block, per_block: int) -> None:
    """Calls `body(row)` for the rows of one block: `per_block` neighbours out of n."""
    first = block * per_block

    def one(i, _):
        body(first + i)

    lax.fori_loop(0, jnp.minimum(per_block, n - first), one, None)


def chunks(width: int) -> list[tuple[int, int]]:
    """(start, size) of the chunks of a row, a multiple of `LANES` long."""
    starts, at, size = [], 0, _WIDEST
    while at < width:
        while size > width - at:
            size //= 2
        starts.append((at, size))
        at += size
    return starts


def slice_width(width: int, most: int) -> int:
    """The longest slice of at most `most` entries into which a row can be cut evenly."""
    lanes = width // LANES
    return LANES * max(
        m for m in range(1, lanes + 1) if lanes % m == 0 and (m == 1 or m * LANES <= most)
    )


def zeros(width: int) -> Row:
    """A row of float32 zeros."""
    return tuple(
        plgpu.layout_cast(jnp.zeros((size,), jnp.float32), _layout(size))
        for _, size in chunks(width)
    )


def load(ref, row, start, width: int) -> Row:
    """`ref[row, start : start + width]` as it is stored."""
    return tuple(load_chunk(ref, row, start + at, size) for at, size in chunks(width))


def load_chunk(ref, row, start, size: int) -> jax.Array:
    """`ref[row, start : start + size]`, one chunk."""
    return plgpu.load(ref.at[row, pl.ds(start, size)], layout=_layout(size), optimized=False)


def store(ref, row, start, values: Row) -> None:
    """Writes a row to `ref[row, start:]`, in the dtype of `ref`."""
    at = start
    for value in values:
        ref.at[row, pl.ds(at, value.size)][...] = value.astype(ref.dtype)
        at = at + value.size


def totals(values: Iterable[tuple[jax.Array, ...]]) -> list[jax.Array]:
    """Sums of all entries of rows, given chunk by chunk; the same on every run.

    Chunks are added up as they come, so that they need not be in registers together, and the
    threads exchange their sums once per row and size of chunk.
    """
    sums: dict[tuple[int, int], jax.Array] = {}
    for chunks_of_rows in values:
        for i, chunk in enumerate(chunks_of_rows):
            key = (i, chunk.size)
            sums[key] = sums[key] + chunk if key in sums else chunk
    rows = 1 + max(i for i, _ in sums)
    return [sum(jnp.sum(s) for (j, _), s in sums.items() if j == i) for i in range(rows)]


def total(values: Iterable[jax.Array]) -> jax.Array:
    """`totals` of one row."""
    return totals((value,) for value in values)[0]


def _layout(size: int):
    return plgpu.Layout.WG_STRIDED((size,), vec_size=math.gcd(size // LANES, 4))
