"""Product at chosen entries on Hopper GPUs: the second pass of `decode_loss`, with its gather."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_loss import mosaic_gpu as decode_loss


def unsupported(target, a_BD, w_LD, indices_BK) -> str | None:
    """See `pallas_kernels.dispatch`."""
    del target
    return decode_loss.unsupported_rows(indices_BK, w_LD, a_BD=a_BD)


def matmul_at_sparse_indices(a_BD: jax.Array, w_LD: jax.Array, indices_BK: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul_at_sparse_indices.vjp.matmul_at_sparse_indices`."""
    dtype = jnp.result_type(a_BD.dtype, w_LD.dtype)
    inner_BK = decode_loss.inner_products(indices_BK.astype(jnp.int32), w_LD, a_BD)
    return inner_BK.astype(dtype)
