"""Sparse linear algebra for k-sparse autoencoders, on plain arrays.

A token's code is k values and k indices, never a dense `[latents]` row. The operations that carry a
training step live in folders, each with a float64-clean `reference`, a fast `xla` path, and kernels
for Hopper GPUs (`mosaic_gpu`) and TPUs (`mosaic_tpu`) where they pay:

    topk_encode(x, w, b, k)                       encoder and exact top-k; no `[batch, latents]`
    decode_loss(values, indices, w, target)       residual, its square, gradient of the values
    weight_grads(values, d_values, indices, ...)  gradients of both matrices from the pairs
    row_update(w, g, mu, nu, ema, ...)            projection, Adam, unit norm, average, copy
    weight_grads_update(...)                      the last two as one
    top_k(x_BL, k), top_k_mask(x_BL, k)           the k largest per row: values, indices; a mask
    dense_sparse_matmul(values, indices, w)       decode: sum_j values[b, j] * w[indices[b, j]]
    matmul_at_sparse_indices(a, w, indices)       <a[b], w[indices[b, j]]>
    sparse_transpose_matmul(values, indices, a)   one weight gradient: the decode, transposed
    pair_list.{compact, decode, dot, add_outer}   products with a code that is one list of pairs

`implementation=None` picks by device, jax version and shape; `explain` says what and why not the
others. A named implementation runs or raises. `dense_below` says at how many latents per kept one a
dense code is cheaper on a device, and `code_layout` picks by it; `block_tokens` and `in_two_stages`
say what memory `topk_encode` and `top_k` take. Inside `jax.shard_map`, pass `check_vma=False`:
loops start from zeros, which do not vary.
"""

from pallas_kernels import pair_list
from pallas_kernels.crossover import code_layout, dense_below
from pallas_kernels.decode_loss.api import DecodeLoss, decode_loss
from pallas_kernels.dense_sparse_matmul.vjp import dense_sparse_matmul
from pallas_kernels.dispatch import interpreting, preferring, target
from pallas_kernels.explain import explain
from pallas_kernels.matmul_at_sparse_indices.vjp import matmul_at_sparse_indices
from pallas_kernels.row_update.api import RowScalars, RowSettings, RowUpdated, row_update
from pallas_kernels.sparse_transpose_matmul.api import sparse_transpose_matmul
from pallas_kernels.top_k.api import top_k
from pallas_kernels.top_k.xla import in_two_stages
from pallas_kernels.top_k_mask.api import top_k_mask
from pallas_kernels.topk_encode.api import Encoded
from pallas_kernels.topk_encode.vjp import topk_encode
from pallas_kernels.topk_encode.xla import block_tokens
from pallas_kernels.weight_grads.api import WeightGrads, weight_grads, weight_grads_of_pairs
from pallas_kernels.weight_grads_update.api import Rows, Updated, weight_grads_update

__all__ = [
    "DecodeLoss",
    "Encoded",
    "RowScalars",
    "RowSettings",
    "RowUpdated",
    "Rows",
    "Updated",
    "WeightGrads",
    "block_tokens",
    "code_layout",
    "decode_loss",
    "dense_below",
    "dense_sparse_matmul",
    "explain",
    "in_two_stages",
    "interpreting",
    "matmul_at_sparse_indices",
    "pair_list",
    "preferring",
    "row_update",
    "sparse_transpose_matmul",
    "target",
    "top_k",
    "top_k_mask",
    "topk_encode",
    "weight_grads",
    "weight_grads_of_pairs",
    "weight_grads_update",
]
