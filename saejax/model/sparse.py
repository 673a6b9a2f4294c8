"""The only door to the kernels: encode to the top k, decode from it, both with sparse gradients.

`encode_top_k` and `decode` are differentiable, for attribution and for losses of one's own; the
training step takes its gradients by hand, from the plain operations (see `codes.py`).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import (
    RowScalars,
    RowSettings,
    RowUpdated,
    WeightGrads,
    block_tokens,
    code_layout,
    decode_loss,
    dense_below,
    dense_sparse_matmul,
    in_two_stages,
    matmul_at_sparse_indices,
    pair_list,
    preferring,
    row_update,
    sparse_transpose_matmul,
    target,
    top_k,
    top_k_mask,
    topk_encode,
    weight_grads,
    weight_grads_of_pairs,
)

__all__ = [
    "RowScalars",
    "RowSettings",
    "RowUpdated",
    "WeightGrads",
    "block_tokens",
    "code_layout",
    "decode",
    "decode_loss",
    "dense_below",
    "dense_sparse_matmul",
    "encode_top_k",
    "in_two_stages",
    "matmul",
    "matmul_at_sparse_indices",
    "of_centred",
    "pair_list",
    "pre_activations",
    "preferring",
    "row_update",
    "sparse_transpose_matmul",
    "target",
    "top_k",
    "top_k_mask",
    "topk_encode",
    "weight_grads",
    "weight_grads_of_pairs",
]

# Accelerators round float32 operands of a product unless told not to, and selection on rounded
# sums picks wrong latents. bfloat16 operands are exact either way.
PRECISION = lax.Precision.HIGHEST


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` of one dtype, accumulated in float32 or wider."""
    accumulate = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.matmul(a, b, precision=PRECISION, preferred_element_type=accumulate)


def pre_activations(
    x_BD: jax.Array, w_enc_LD: jax.Array, latent_bias_L: jax.Array, pre_bias_D: jax.Array, dtype
) -> jax.Array:
    """`W_enc (x - b_pre) + b_latent`, multiplied in `dtype`, accumulated in float32 or wider.

    Returns `[B, L]`. Selection reads these sums before any rounding back to `dtype`.
    """
    return of_centred((x_BD - pre_bias_D).astype(dtype), w_enc_LD.astype(dtype), latent_bias_L)


def of_centred(centred_BD: jax.Array, w_enc_LD: jax.Array, latent_bias_L: jax.Array) -> jax.Array:
    """Pre-activations of inputs from which pre_bias was subtracted; operands of one dtype."""
    return matmul(centred_BD, w_enc_LD.T) + latent_bias_L


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def encode_top_k(
    x_BD: jax.Array,
    w_enc_LD: jax.Array,
    latent_bias_L: jax.Array,
    pre_bias_D: jax.Array,
    k: int,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """The k largest pre-activations of every token (before any ReLU).

    Args:
      x_BD: normalised activations.
      w_enc_LD: encoder rows.
      latent_bias_L: bias of every latent.
      pre_bias_D: subtracted from the input.
      k: latents kept.
      dtype: of the multiplication.

    Returns:
      values `[B, k]` float32 or wider, descending, and indices `[B, k]` int32; ties to the lowest
      index. The gradient touches the selected latents alone, and the pre-bias gradient is summed
      over the batch before it meets the encoder (Gao et al. 2024, App. D).
    """
    centred_BD = (x_BD - pre_bias_D).astype(dtype)
    values_BK, indices_BK, _ = topk_encode(centred_BD, w_enc_LD.astype(dtype), latent_bias_L, k)
    return values_BK, indices_BK


def _encode_forward(x_BD, w_enc_LD, latent_bias_L, pre_bias_D, k, dtype):
    values_BK, indices_BK = encode_top_k(x_BD, w_enc_LD, latent_bias_L, pre_bias_D, k, dtype)
    return (values_BK, indices_BK), (x_BD, w_enc_LD, latent_bias_L, pre_bias_D, indices_BK)


def _encode_backward(k, dtype, residuals, cotangents):
    del k, dtype  # gradients are formed at full precision
    x_BD, w_enc_LD, latent_bias_L, pre_bias_D, indices_BK = residuals
    d_values_BK, _ = cotangents
    n_latents = w_enc_LD.shape[0]
    d_w_LD = sparse_transpose_matmul(d_values_BK, indices_BK, x_BD - pre_bias_D, n_latents)
    ones_B1 = jnp.ones((len(x_BD), 1), d_values_BK.dtype)
    d_bias_L = sparse_transpose_matmul(d_values_BK, indices_BK, ones_B1, n_latents)[:, 0]
    d_pre_D = -jnp.matmul(d_bias_L, w_enc_LD, precision=PRECISION)
    # Needed by attribution, not by training: there the compiler drops it.
    d_x_BD = dense_sparse_matmul(d_values_BK, indices_BK, w_enc_LD)
    return (
        d_x_BD.astype(x_BD.dtype),
        d_w_LD.astype(w_enc_LD.dtype),
        d_bias_L.astype(latent_bias_L.dtype),
        d_pre_D.astype(pre_bias_D.dtype),
    )


encode_top_k.defvjp(_encode_forward, _encode_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def decode(
    values_BK: jax.Array, indices_BK: jax.Array, w_dec_LD: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """`sum_j values[:, j] * w_dec[indices[:, j]]`: `[B, D]` float32 or wider, without pre_bias.

    Rows are read in `dtype` and accumulated in float32 or wider; gradients reach the master
    weights unrounded.
    """
    return dense_sparse_matmul(values_BK, indices_BK, w_dec_LD.astype(dtype))


def _decode_forward(values_BK, indices_BK, w_dec_LD, dtype):
    return decode(values_BK, indices_BK, w_dec_LD, dtype), (values_BK, indices_BK, w_dec_LD)


def _decode_backward(dtype, residuals, d_out_BD):
    values_BK, indices_BK, w_dec_LD = residuals
    d_values_BK = matmul_at_sparse_indices(d_out_BD, w_dec_LD.astype(dtype), indices_BK)
    d_w_LD = sparse_transpose_matmul(values_BK, indices_BK, d_out_BD, w_dec_LD.shape[0])
    return d_values_BK.astype(values_BK.dtype), None, d_w_LD


decode.defvjp(_decode_forward, _decode_backward)
