"""Plain definition of the transposed sparse decode."""

import jax
import jax.numpy as jnp
from jax import lax


def sparse_transpose_matmul(
    values_BK: jax.Array,
    indices_BK: jax.Array,
    a_BD: jax.Array,
    n: int,
    total_LD: jax.Array | None = None,
) -> jax.Array:
    """Forms the dense code `[B, n]` and multiplies."""
    dtype = jnp.result_type(values_BK, a_BD) if total_LD is None else total_LD.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    tokens_B1 = jnp.arange(indices_BK.shape[0])[:, None]
    code_BL = jnp.zeros((indices_BK.shape[0], n), wide)
    code_BL = code_BL.at[tokens_B1, indices_BK].add(values_BK.astype(wide))
    out_LD = jnp.matmul(code_BL.T, a_BD.astype(wide), precision=lax.Precision.HIGHEST)
    return (out_LD if total_LD is None else total_LD + out_LD).astype(dtype)
