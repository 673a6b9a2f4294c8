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
    those of w and b are `sparse_transpose_matmul`'s, by XLA whatever implementation was named;
    their order of addition is fixed, on GPUs too. `weight_grads` has kernels.

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
    ones_B1 = jnp.ones((len(x_BD), 1), d_values_BK.dtype)
    d_b_L = sparse_transpose_matmul(d_values_BK, indices_BK, ones_B1, len(w_LD))[:, 0]
    # Needed by attribution, not by training: there the compiler drops it.
    d_x_BD = dense_sparse_matmul(d_values_BK, indices_BK, w_LD)
    return d_x_BD.astype(x_BD.dtype), d_w_LD.astype(w_LD.dtype), d_b_L.astype(b_L.dtype)


topk_encode.defvjp(_forward, _backward)
