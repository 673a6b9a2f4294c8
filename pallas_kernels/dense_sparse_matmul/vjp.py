"""Sparse decode with its gradients (Gao et al. 2024, App. D: DenseSparseMatmul)."""

import functools

import jax

from pallas_kernels import dispatch
from pallas_kernels.dense_sparse_matmul import reference, xla
from pallas_kernels.matmul_at_sparse_indices import api as at_indices
from pallas_kernels.sparse_transpose_matmul import api as transpose

_IMPLEMENTATIONS = {
    "reference": reference.dense_sparse_matmul,
    "xla": xla.dense_sparse_matmul,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense_sparse_matmul(
    values_BK: jax.Array,
    indices_BK: jax.Array,
    w_LD: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """`out[b] = sum_j values[b, j] * w[indices[b, j]]`.

    Args:
      values_BK: `[B, K]` floating point.
      indices_BK: `[B, K]` integers in [0, L).
      w_LD: `[L, D]`, rows contiguous.
      implementation: "xla", "reference", or None.

    Returns:
      `[B, D]` in the promoted dtype. Differentiable in values and w; neither gradient forms a
      dense code.
    """
    fn = dispatch.choose("dense_sparse_matmul", implementation, _IMPLEMENTATIONS)
    return fn(values_BK, indices_BK, w_LD)


def _forward(values_BK, indices_BK, w_LD, implementation):
    out_BD = dense_sparse_matmul(values_BK, indices_BK, w_LD, implementation)
    return out_BD, (values_BK, indices_BK, w_LD)


def _backward(implementation, residuals, d_out_BD):
    values_BK, indices_BK, w_LD = residuals
    d_values_BK = at_indices.compute(d_out_BD, w_LD, indices_BK, implementation)
    d_w_LD = transpose.sparse_transpose_matmul(
        values_BK, indices_BK, d_out_BD, w_LD.shape[0], implementation=implementation
    )
    return d_values_BK.astype(values_BK.dtype), None, d_w_LD.astype(w_LD.dtype)


dense_sparse_matmul.defvjp(_forward, _backward)
