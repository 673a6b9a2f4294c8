"""Sparse linear algebra for k-sparse autoencoders, on plain arrays.

A token's code is k values and k indices, never a dense `[latents]` row. The operations that carry a
training step live in folders, each with a float64-clean `reference` and a fast `xla` path:

    top_k(x_BL, k)                                values and indices of the k largest per row
    dense_sparse_matmul(values, indices, w)       decode: sum_j values[b, j] * w[indices[b, j]]
    matmul_at_sparse_indices(a, w, indices)       <a[b], w[indices[b, j]]>
    sparse_transpose_matmul(values, indices, a)   weight gradients: the decode, transposed
    pair_list.{compact, decode, dot, add_outer}   the same for a code that is one list of pairs
"""

from pallas_kernels import pair_list
from pallas_kernels.dense_sparse_matmul.vjp import dense_sparse_matmul
from pallas_kernels.matmul_at_sparse_indices.vjp import matmul_at_sparse_indices
from pallas_kernels.sparse_transpose_matmul.api import sparse_transpose_matmul
from pallas_kernels.top_k.api import top_k

__all__ = [
    "dense_sparse_matmul",
    "matmul_at_sparse_indices",
    "pair_list",
    "sparse_transpose_matmul",
    "top_k",
]
