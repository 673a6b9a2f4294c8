"""Sparse decode with its gradients (Gao et al. 2024, App. D: DenseSparseMatmul)."""

import functools

import jax

from pallas_kernels import checks, dispatch
from pallas_kernels.matmul_at_sparse_indices import api as at_indices
from pallas_kernels.sparse_transpose_matmul import api as transpose

AVAILABLE = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense_sparse_matmul(
    values_BK: jax.Array,
    indices_BK: jax.Array,
    w_LD: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """`out[b] = sum_j values[b, j] * w[indices[b, j]]`.

    In the backward pass the gradient of w is `sparse_transpose_matmul`'s, by XLA whichever kernel
    was named: its order of addition is fixed, on GPUs too. `weight_grads` has kernels.

    Args:
      values_BK: `[B, K]` floating point.
      indices_BK: `[B, K]` int32 in [0, L).
      w_LD: `[L, D]`, rows contiguous.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", "reference", or None.

    Returns:
      `[B, D]` in the promoted dtype. Differentiable in values and w; neither gradient forms a
      dense code.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype.
      NotImplementedError: the named implementation cannot run here.
    """
    op = "dense_sparse_matmul"
    checks.code(op, values_BK, indices_BK, ("values_BK", "indices_BK"))
    checks.array(op, "w_LD", w_LD, (None, None))
    checks.result(op, values_BK.shape[0], w_LD.shape[1])
    return dispatch.call(op, implementation, AVAILABLE, values_BK, indices_BK, w_LD)


def _forward(values_BK, indices_BK, w_LD, implementation):
    out_BD = dense_sparse_matmul(values_BK, indices_BK, w_LD, implementation)
    return out_BD, (values_BK, indices_BK, w_LD)


def _backward(implementation, residuals, d_out_BD):
    values_BK, indices_BK, w_LD = residuals
    d_values_BK = at_indices.compute(d_out_BD, w_LD, indices_BK, implementation)
    # The weight gradient alone has no kernel: `weight_grads` makes both at once.
    portable = None if implementation in dispatch.KERNELS else implementation
    d_w_LD = transpose.sparse_transpose_matmul(
        values_BK, indices_BK, d_out_BD, w_LD.shape[0], implementation=portable
    )
    return d_values_BK.astype(values_BK.dtype), None, d_w_LD.astype(w_LD.dtype)


dense_sparse_matmul.defvjp(_forward, _backward)
