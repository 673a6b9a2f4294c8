"""Plain definition of the product at chosen entries."""

import jax
import jax.numpy as jnp
from jax import lax


def matmul_at_sparse_indices(a_BD: jax.Array, w_LD: jax.Array, indices_BK: jax.Array) -> jax.Array:
    """Gathers every row, then contracts; materialises `[B, K, D]`."""
    dtype = jnp.result_type(a_BD, w_LD)
    wide = jnp.promote_types(dtype, jnp.float32)
    rows_BKD = w_LD[indices_BK].astype(wide)
    return jnp.einsum(
        "bd,bkd->bk", a_BD.astype(wide), rows_BKD, precision=lax.Precision.HIGHEST
    ).astype(dtype)
