"""Product at chosen entries on TPUs: the second half of `decode_loss`."""

import jax
import jax.numpy as jnp

from pallas_kernels import tpu
from pallas_kernels.decode_loss import mosaic_tpu as gathered
from pallas_kernels.dispatch import Target


def unsupported(target: Target, a_BD, w_LD, indices_BK) -> str | None:
    """Why the call cannot run; None if it can. See `pallas_kernels.dispatch`."""
    refusal = tpu.refusal(target, a_BD=a_BD, w_LD=w_LD)
    return refusal or gathered.no_products(indices_BK, w_LD, a_BD.dtype)


def matmul_at_sparse_indices(a_BD: jax.Array, w_LD: jax.Array, indices_BK: jax.Array) -> jax.Array:
    """See `pallas_kernels.matmul_at_sparse_indices.vjp.matmul_at_sparse_indices`."""
    (out_BK,) = gathered.products(None, indices_BK, w_LD, a_BD, out_dtype=a_BD.dtype)
    return out_BK.astype(jnp.result_type(a_BD, w_LD))
