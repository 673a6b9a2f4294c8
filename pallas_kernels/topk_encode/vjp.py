"""Encoder and exact top-k with gradients that touch the kept latents alone."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dense_sparse_matmul.vjp import dense_sparse_matmul
from pallas_kernels.sparse_transpose_matmul.api import sparse_transpose_matmul
from pallas_kernels.topk_encode import api


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def topk_encode(
    x_BD: jax.Array,
    w_LD: jax.Array,
    b_L: jax.Array,
    k: int,
    implementation: str | None = None,
) -> api.Encoded:
    """The k largest of `x @ w.T + b` per token; no `[B, L]` array exists for the whole batch.

    Products are accumulated, and the selection is made, in float32 (or wider, for wider inputs).
    The gradient of the selection itself is zero (Gao et al. 2024, App. D). In the backward pass
    those of w and b are XLA's scatter-adds, whatever implementation was named; on a GPU they may
    add in another order on a rerun. `weight_grads` has kernels that do not.

    Args:
      x_BD: `[B, D]` floating point.
      w_LD: `[L, D]` encoder rows.
      b_L: `[L]`; a latent whose bias is -inf comes after all others.
      k: 1 <= k <= L.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", "reference", or None.

    Returns:
      `Encoded`: values, indices, and how many tokens a kernel had to select again. Equal values
      are ordered by ascending index. NaN counts as larger than every number, so it surfaces.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype.
      NotImplementedError: the named implementation cannot run here.
    """
    return api.compute(x_BD, w_LD, b_L, k, implementation)


def _forward(x_BD, w_LD, b_L, k, implementation):
    encoded = api.compute(x_BD, w_LD, b_L, k, implementation)
    return encoded, (x_BD, w_LD, b_L, encoded.indices_BK)


def _backward(k, implementation, residuals, cotangents):
    del k, implementation  # the gradients are products of their own, picked by shape
    x_BD, w_LD, b_L, indices_BK = residuals
    d_values_BK, _, _ = cotangents
    d_w_LD = sparse_transpose_matmul(d_values_BK, indices_BK, x_BD, len(w_LD))
    d_b_L = jnp.zeros(len(w_LD), d_values_BK.dtype)
    d_b_L = d_b_L.at[indices_BK.reshape(-1)].add(d_values_BK.reshape(-1))
    # Needed by attribution, not by training: there the compiler drops it.
    d_x_BD = dense_sparse_matmul(d_values_BK, indices_BK, w_LD)
    return d_x_BD.astype(x_BD.dtype), d_w_LD.astype(w_LD.dtype), d_b_L.astype(b_L.dtype)


topk_encode.defvjp(_forward, _backward)
