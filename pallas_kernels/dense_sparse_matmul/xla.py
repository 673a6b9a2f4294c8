"""Sparse decode as k gather-and-accumulate passes; nothing of shape `[B, K, D]` exists."""

import jax
import jax.numpy as jnp
from jax import lax

# Unrolling lets XLA fuse neighbouring passes over the accumulator (measured: 1.7x at 8).
_UNROLL = 8


def dense_sparse_matmul(values_BK: jax.Array, indices_BK: jax.Array, w_LD: jax.Array) -> jax.Array:
    """See `pallas_kernels.dense_sparse_matmul.vjp.dense_sparse_matmul`."""
    dtype = jnp.result_type(values_BK.dtype, w_LD.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    n_tokens, k = indices_BK.shape

    def add_one(j, total_BD):
        value_B1 = lax.dynamic_slice_in_dim(values_BK, j, 1, axis=1).astype(wide)
        index_B = lax.dynamic_index_in_dim(indices_BK, j, axis=1, keepdims=False)
        return total_BD + value_B1 * w_LD[index_B]

    zero_BD = jnp.zeros((n_tokens, w_LD.shape[1]), wide)
    return lax.fori_loop(0, k, add_one, zero_BD, unroll=min(_UNROLL, k)).astype(dtype)
