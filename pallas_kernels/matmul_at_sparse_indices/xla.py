"""Product at chosen entries, a few tokens at a time so that the gathered rows stay in cache."""

import jax
import jax.numpy as jnp
from jax import lax

# Rows of 64 tokens at k = 32, d = 512 are 4 MB: they fit a CPU core's share of the last cache.
_TOKENS_PER_BLOCK = 64


def matmul_at_sparse_indices(a_BD: jax.Array, w_LD: jax.Array, indices_BK: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul_at_sparse_indices.vjp.matmul_at_sparse_indices`."""

    def one_token(args):
        a_D, indices_K = args
        return jnp.einsum("d,kd->k", a_D, w_LD[indices_K], precision=lax.Precision.HIGHEST)

    return lax.map(one_token, (a_BD, indices_BK), batch_size=_TOKENS_PER_BLOCK)
