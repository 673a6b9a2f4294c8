"""Plain definition of the mask of the top k."""

import jax
import jax.numpy as jnp

from pallas_kernels.top_k import reference


def top_k_mask(x_BL: jax.Array, k: int) -> jax.Array:
    """Sorts every row and marks what comes first."""
    _, indices_BK = reference.top_k(x_BL, k)
    mask_BL = jnp.zeros(x_BL.shape, bool)
    return mask_BL.at[jnp.arange(len(x_BL))[:, None], indices_BK].set(True)
