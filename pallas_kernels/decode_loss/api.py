"""Reconstruction error and its gradient in the values, from one gather of decoder rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import checks, dispatch

AVAILABLE = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")


class DecodeLoss(NamedTuple):
    """What a sparse reconstruction leaves.

    Attributes:
      residual_BD: `e = target - reconstruction`, rounded to the dtype asked for.
      inner_BK: `<residual[b], w[indices[b, j]]>`, float32 or wider; -2 times it is the gradient of
        the squared error in the values. Of the rounded residual, as it is where the latents are
        split over devices, which send each other residuals in the compute dtype.
      squared_error_B: `sum e^2` of every token, of the unrounded e, float32 or wider.
    """

    residual_BD: jax.Array
    inner_BK: jax.Array
    squared_error_B: jax.Array


def decode_loss(
    values_BK: jax.Array,
    indices_BK: jax.Array,
    w_LD: jax.Array,
    target_BD: jax.Array,
    *,
    residual_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> DecodeLoss:
    """Residual of `sum_j values[:, j] * w[indices[:, j]]`, and what its gradients need.

    Not differentiable: it is a gradient already. `dense_sparse_matmul` is its differentiable part.

    Args:
      values_BK: `[B, K]` floating point.
      indices_BK: `[B, K]` int32 in [0, L).
      w_LD: `[L, D]` decoder rows.
      target_BD: `[B, D]`.
      residual_dtype: of the residual; None is the target's.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", "reference", or None.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype.
      NotImplementedError: the named implementation cannot run here.
    """
    op = "decode_loss"
    checks.code(op, values_BK, indices_BK, ("values_BK", "indices_BK"))
    checks.array(op, "w_LD", w_LD, (None, None))
    checks.array(op, "target_BD", target_BD, (values_BK.shape[0], w_LD.shape[1]))
    arrays = (values_BK, indices_BK, w_LD, target_BD)
    dtype = target_BD.dtype if residual_dtype is None else residual_dtype
    dtype = checks.dtype(op, "residual_dtype", dtype)
    return DecodeLoss(*dispatch.call(op, implementation, AVAILABLE, *arrays, residual_dtype=dtype))
