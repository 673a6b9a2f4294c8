"""Plain definition of the sparse decode."""

import jax
import jax.numpy as jnp
from jax import lax


def dense_sparse_matmul(values_BK: jax.Array, indices_BK: jax.Array, w_LD: jax.Array) -> jax.Array:
    """Gathers every row, then contracts; materialises `[B, K, D]`."""
    dtype = jnp.result_type(values_BK, w_LD)
    wide = jnp.promote_types(dtype, jnp.float32)
    rows_BKD = w_LD[indices_BK].astype(wide)
    return jnp.einsum(
        "bk,bkd->bd", values_BK.astype(wide), rows_BKD, precision=lax.Precision.HIGHEST
    ).astype(dtype)
