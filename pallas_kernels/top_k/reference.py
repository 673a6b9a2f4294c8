"""Plain definition of the row-wise top-k."""

import jax
import jax.numpy as jnp


def top_k(x_BL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """A full stable sort per row, by (value descending, index ascending)."""
    order_BL = jnp.argsort(x_BL, axis=-1, descending=True, stable=True)
    idx_BK = order_BL[..., :k].astype(jnp.int32)
    return jnp.take_along_axis(x_BL, idx_BK, axis=-1), idx_BK
