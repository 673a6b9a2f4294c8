"""Plain definition of the product at chosen entries."""

import jax
import jax.numpy as jnp


def matmul_at_sparse_indices(a_BD: jax.Array, w_LD: jax.Array, indices_BK: jax.Array) -> jax.Array:
    """Gathers every row, then contracts; materialises `[B, K, D]`."""
    return jnp.einsum("bd,bkd->bk", a_BD, w_LD[indices_BK])
