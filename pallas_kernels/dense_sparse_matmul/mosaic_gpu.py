"""Sparse decode on Hopper GPUs: a token's K pairs are a segment of `weight_grads`' sums.

Rows go straight from memory into float32 registers, eight of them on their way at a time.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_rows
from pallas_kernels.weight_grads import mosaic_gpu as grads


def unsupported(target, values_BK, indices_BK, w_LD) -> str | None:
    """See `pallas_kernels.dispatch`."""
    del target, indices_BK
    return gpu_rows.unsupported(values_BK=values_BK, w_LD=w_LD)


def dense_sparse_matmul(values_BK: jax.Array, indices_BK: jax.Array, w_LD: jax.Array) -> jax.Array:
    """See `pallas_kernels.dense_sparse_matmul.vjp.dense_sparse_matmul`."""
    tokens, k = indices_BK.shape
    starts_B = jnp.arange(tokens, dtype=jnp.int32) * k
    pairs = (values_BK.astype(jnp.float32).reshape(-1), indices_BK.astype(jnp.int32).reshape(-1))
    given = grads.Source(*pairs, w_LD, starts_B, starts_B + k)
    dtype = jnp.result_type(values_BK.dtype, w_LD.dtype)
    return grads.segment_sums(given, dtype=dtype)[0]
