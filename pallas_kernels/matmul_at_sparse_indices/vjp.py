"""Product at chosen entries with its gradients (Gao et al. 2024, App. D: MatmulAtSparseIndices)."""

import functools

import jax

from pallas_kernels import dispatch
from pallas_kernels.dense_sparse_matmul import vjp as decode
from pallas_kernels.matmul_at_sparse_indices import api
from pallas_kernels.sparse_transpose_matmul import api as transpose


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul_at_sparse_indices(
    a_BD: jax.Array,
    w_LD: jax.Array,
    indices_BK: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """`out[b, j] = <a[b], w[indices[b, j]]>`.

    In the backward pass the gradient of w is `sparse_transpose_matmul`'s, by XLA whichever kernel
    was named: its order of addition is fixed, on GPUs too. `weight_grads` has kernels.

    Args:
      a_BD: `[B, D]` floating point.
      w_LD: `[L, D]`, rows contiguous.
      indices_BK: `[B, K]` int32 in [0, L).
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", "reference", or None.

    Returns:
      `[B, K]` in the promoted dtype. Differentiable in a and w.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype.
      NotImplementedError: the named implementation cannot run here.
    """
    return api.compute(a_BD, w_LD, indices_BK, implementation)


def _forward(a_BD, w_LD, indices_BK, implementation):
    out_BK = api.compute(a_BD, w_LD, indices_BK, implementation)
    return out_BK, (a_BD, w_LD, indices_BK)


def _backward(implementation, residuals, d_out_BK):
    a_BD, w_LD, indices_BK = residuals
    d_a_BD = decode.dense_sparse_matmul(d_out_BK, indices_BK, w_LD, implementation)
    # The weight gradient alone has no kernel: `weight_grads` makes both at once.
    portable = None if implementation in dispatch.KERNELS else implementation
    d_w_LD = transpose.sparse_transpose_matmul(
        d_out_BK, indices_BK, a_BD, w_LD.shape[0], implementation=portable
    )
    return d_a_BD.astype(a_BD.dtype), d_w_LD.astype(w_LD.dtype), None


matmul_at_sparse_indices.defvjp(_forward, _backward)
