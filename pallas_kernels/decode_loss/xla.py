"""Reconstruction error and its gradient as two passes over gathered rows."""

import jax.numpy as jnp

from pallas_kernels.dense_sparse_matmul import xla as decode
from pallas_kernels.matmul_at_sparse_indices import xla as at_indices


def decode_loss(values_BK, indices_BK, w_LD, target_BD, *, residual_dtype: jnp.dtype):
    """See `pallas_kernels.decode_loss.api.decode_loss`."""
    dtype = jnp.result_type(values_BK, w_LD, target_BD, jnp.float32)
    e_BD = target_BD - decode.dense_sparse_matmul(values_BK.astype(dtype), indices_BK, w_LD)
    residual_BD = e_BD.astype(residual_dtype)
    inner_BK = at_indices.matmul_at_sparse_indices(residual_BD.astype(dtype), w_LD, indices_BK)
    return residual_BD, inner_BK, jnp.square(e_BD).sum(-1)
