"""Reconstruction error on Hopper GPUs: one gather of decoder rows serves it and its gradient.

A block of one warpgroup takes a few tokens, one after the other, and one slice of the rows: it
copies the slice of the token's K rows to shared memory, sums them up to the error e, and multiplies
e with every one of them. Shared memory bounds the slice to `_SLICE_BYTES / K`, so that several
blocks fit on a multiprocessor, one of them waiting for rows while another works. What belongs to a
whole row is left as one float32 number per slice, and XLA adds the slices up, in order.

The two passes hold the rows differently. For the sum every thread has some columns of all rows;
for the products a warp has whole rows, so that no other warp is needed to add one up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import gpu_rows

_SLICE_BYTES = 72 * 1024  # of shared memory for rows: three blocks per multiprocessor
_MOST_BYTES = 192 * 1024  # where K is so large that the narrowest slice needs more
_WIDEST = 1024  # entries of a slice: 32 registers of e to a thread in the second pass
_TOKENS_PER_BLOCK = 8
_GROUP = 8  # rows of one step of the second pass, two to a warp
_UNROLL = 4  # rows of one step of the first pass


def unsupported(target, values_BK, indices_BK, w_LD, target_BD, *, residual_dtype):
    """See `pallas_kernels.dispatch`."""
    del target
    if jnp.dtype(residual_dtype).name not in ("float32", "bfloat16"):
        return f"it writes residuals in float32 and bfloat16, not {jnp.dtype(residual_dtype).name}"
    return unsupported_rows(indices_BK, w_LD, values_BK=values_BK, target_BD=target_BD)


def unsupported_rows(indices_BK, w_LD, **others) -> str | None:
    """Why a gather of such rows cannot run; None if it can."""
    k, size = indices_BK.shape[1], jnp.dtype(w_LD.dtype).itemsize
    most = _MOST_BYTES // (gpu_rows.LANES * size)
    if not 1 <= k <= most:
        return f"k = {k} rows are to be in shared memory together, and it takes 1 to {most}"
    return gpu_rows.unsupported(w_LD=w_LD, **others)


def decode_loss(values_BK, indices_BK, w_LD, target_BD, *, residual_dtype):
    """See `pallas_kernels.decode_loss.api.decode_loss`."""
    values_BK = values_BK.astype(jnp.float32)
    return _gather(values_BK, indices_BK, w_LD, target_BD, residual_dtype)


def inner_products(indices_BK, w_LD, a_BD):
    """`<a[b], w[indices[b, j]]>`, float32 `[B, K]`: the second pass alone."""
    return _gather(None, indices_BK, w_LD, a_BD, a_BD.dtype)[1]


def _gather(values_BK, indices_BK, w_LD, target_BD, residual_dtype):
    """What `decode_loss` returns; without values, of e = target the products alone."""
    (tokens, k), (n, d) = indices_BK.shape, w_LD.shape
    if 0 in (tokens, n, d):
        zeros_B = jnp.zeros(tokens, jnp.float32)
        return target_BD.astype(residual_dtype), jnp.zeros((tokens, k), jnp.float32), zeros_B
    rows = -(-k // _GROUP) * _GROUP
    most = _SLICE_BYTES // (rows * w_LD.dtype.itemsize)
    width = gpu_rows.slice_width(d, min(most, _WIDEST))
    slices, groups = d // width, -(-tokens // _TOKENS_PER_BLOCK)
    box = (width // gpu_rows.LANES, gpu_rows.LANES)  # copies take at most 256 entries a dimension
    tiled = (d // gpu_rows.LANES, gpu_rows.LANES)
    decodes = values_BK is not None

    def gather(values, indices, w, target, *refs):
        (*results, inner, fetched, e_shared, inner_shared, arrived) = refs
        block = lax.axis_index("block")
        piece = lax.div(block, groups)
        columns = pl.ds(piece * box[0], box[0])

        def one(token):
            _fetch(w, indices, token, columns, fetched, arrived, k)
            e = _load(target.at[token, columns], box)
            plgpu.barrier_wait(arrived)
            if decodes:
                residual, squared = results
                e = _subtract_rows(e.astype(jnp.float32), values, token, fetched, k)
                squared[piece, token] = jnp.sum(e * e)
                e = e.astype(residual_dtype)
                residual.at[token, columns][...] = e
            e_shared[...] = e
            plgpu.commit_smem()
            _multiply_rows(e_shared, fetched, inner_shared)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(inner_shared, inner.at[piece, token])
            plgpu.wait_smem_to_gmem(0)

        gpu_rows.for_rows_of_block(one, tokens, lax.rem(block, groups), _TOKENS_PER_BLOCK)

    kinds = [jax.ShapeDtypeStruct((slices, tokens, rows), jnp.float32)]
    if decodes:
        residual = jax.ShapeDtypeStruct((tokens, *tiled), residual_dtype)
        kinds = [residual, jax.ShapeDtypeStruct((slices, tokens), jnp.float32), *kinds]
    scratch = [
        plgpu.SMEM((rows, *box), w_LD.dtype),
        plgpu.SMEM(box, residual_dtype),
        plgpu.SMEM((rows,), jnp.float32),
        plgpu.Barrier(num_arrivals=rows),
    ]
    run = gpu_rows.kernel(gather, kinds, slices * groups, scratch)
    *first, inner = run(
        values_BK, indices_BK, w_LD.reshape(n, *tiled), target_BD.reshape(tokens, *tiled)
    )
    inner_BK = inner.sum(0)[:, :k]
    if not decodes:
        return None, inner_BK, None
    return first[0].reshape(tokens, d), inner_BK, first[1].sum(0)


def _fetch(w, indices, token, columns, fetched, arrived, k: int) -> None:
    """Starts the copies of a token's rows; the last one fills what a group has too much."""

    def one(j, _):
        row = indices[token, jnp.minimum(j, k - 1)]
        plgpu.copy_gmem_to_smem(w.at[row, columns], fetched.at[j], arrived)

    lax.fori_loop(0, fetched.shape[0], one, None, unroll=_GROUP)


def _subtract_rows(e, values, token, fetched, k: int):
    """`e - sum_j values[token, j] * row j`, in the order of j."""

    def one(j, total):
        row = _load(fetched.at[j], total.shape).astype(jnp.float32)
        return total + values[token, j] * row

    total = plgpu.layout_cast(jnp.zeros(e.shape, jnp.float32), _columns(e.shape))
    total = lax.fori_loop(0, k // _UNROLL * _UNROLL, one, total, unroll=_UNROLL)
    return e - lax.fori_loop(k // _UNROLL * _UNROLL, k, one, total)


def _multiply_rows(e_shared, fetched, out) -> None:
    """`out[j] = <e, row j>` for all rows, a warp at a row."""
    (rows, *box) = fetched.shape
    of_e, of_rows = _lanes()
    e = plgpu.load(e_shared, layout=of_e, optimized=False).astype(jnp.float32)
    e = lax.broadcast_in_dim(e, (_GROUP, *box), (1, 2))
    e = plgpu.layout_cast(e, of_rows)

    def one(i, _):
        group = pl.ds(i * _GROUP, _GROUP)
        some = plgpu.load(fetched.at[group], layout=of_rows, optimized=False)
        products = some.astype(jnp.float32) * e
        out.at[group][...] = jnp.sum(jnp.sum(products, axis=1), axis=1)

    lax.fori_loop(0, rows // _GROUP, one, None)


def _load(ref, shape):
    return plgpu.load(ref, layout=_columns(shape), optimized=False)


def _columns(shape):
    """Every thread of the warpgroup holds entries of the row."""
    return plgpu.Layout.WG_STRIDED(tuple(shape), vec_size=2 if shape[0] % 2 == 0 else 1)


def _lanes():
    """Layouts with rows within warps, four neighbours to a thread: one row in all, and many."""
    vector, lanes = 4, gpu_rows.LANES
    one = plgpu.Layout.TILED(
        plgpu.Tiling(((1, lanes), (vector,))),
        warp_dims=(plgpu.Replicated(4),),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    every = plgpu.Layout.TILED(
        plgpu.Tiling(((4, 1, lanes), (vector,))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1
    )
    return one, every
