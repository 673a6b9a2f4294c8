"""Plain definition of the transposed sparse decode."""

import jax
import jax.numpy as jnp


def sparse_transpose_matmul(
    values_BK: jax.Array,
    indices_BK: jax.Array,
    a_BD: jax.Array,
    n: int,
    total_LD: jax.Array | None = None,
) -> jax.Array:
    """Forms the dense code `[B, n]` and multiplies."""
    tokens_B1 = jnp.arange(indices_BK.shape[0])[:, None]
    code_BL = jnp.zeros((indices_BK.shape[0], n), values_BK.dtype)
    code_BL = code_BL.at[tokens_B1, indices_BK].add(values_BK)
    out_LD = jnp.einsum("bl,bd->ld", code_BL, a_BD)
    return out_LD if total_LD is None else total_LD + out_LD
