"""Transposed sparse decode as k scatter-adds of whole rows.

Column j of the code touches every token once, so each pass adds `[B, D]` scaled rows into the
`[L, D]` sum. On CPU the scatter is sequential, hence deterministic. (Adding latent by latent, as
`weight_grads` does for training, is faster where pairs outnumber latents.)
"""

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
    """See `pallas_kernels.sparse_transpose_matmul.api.sparse_transpose_matmul`."""
    dtype = jnp.result_type(values_BK, a_BD) if total_LD is None else total_LD.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    total_LD = jnp.zeros((n, a_BD.shape[1]), wide) if total_LD is None else total_LD.astype(wide)

    def add_one(j, total_LD):
        value_B1 = lax.dynamic_slice_in_dim(values_BK, j, 1, axis=1)
        index_B = lax.dynamic_index_in_dim(indices_BK, j, axis=1, keepdims=False)
        return total_LD.at[index_B].add(value_B1.astype(wide) * a_BD)

    return lax.fori_loop(0, indices_BK.shape[1], add_one, total_LD).astype(dtype)
