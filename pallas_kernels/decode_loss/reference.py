"""Plain definition of the reconstruction error and its gradient."""

import jax
import jax.numpy as jnp


def decode_loss(values_BK, indices_BK, w_LD, target_BD, *, residual_dtype: jnp.dtype):
    """Gathers every row, then contracts; materialises `[B, K, D]`."""
    dtype = jnp.result_type(values_BK, w_LD, target_BD, jnp.float32)
    rows_BKD = w_LD[indices_BK].astype(dtype)
    with jax.default_matmul_precision("highest"):
        e_BD = target_BD - jnp.einsum("bk,bkd->bd", values_BK.astype(dtype), rows_BKD)
        residual_BD = e_BD.astype(residual_dtype)
        inner_BK = jnp.einsum("bd,bkd->bk", residual_BD.astype(dtype), rows_BKD)
    return residual_BD, inner_BK, jnp.square(e_BD).sum(-1)
