"""Plain definition of the sparse decode."""

import jax
import jax.numpy as jnp


def dense_sparse_matmul(values_BK: jax.Array, indices_BK: jax.Array, w_LD: jax.Array) -> jax.Array:
    """Gathers every row, then contracts; materialises `[B, K, D]`."""
    return jnp.einsum("bk,bkd->bd", values_BK, w_LD[indices_BK])
