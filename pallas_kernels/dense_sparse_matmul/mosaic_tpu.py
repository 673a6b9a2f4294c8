"""Sparse decode on TPUs: the first half of `decode_loss`."""

import jax
import jax.numpy as jnp

from pallas_kernels import tpu
from pallas_kernels.decode_loss import mosaic_tpu as gathered
from pallas_kernels.dispatch import Target


def unsupported(target: Target, values_BK, indices_BK, w_LD) -> str | None:
    """Why the call cannot run; None if it can. See `pallas_kernels.dispatch`."""
    dtype = jnp.result_type(values_BK, w_LD)
    refusal = tpu.refusal(target, values_BK=values_BK, w_LD=w_LD)
    return refusal or gathered.no_products(indices_BK, w_LD, dtype)


def dense_sparse_matmul(values_BK: jax.Array, indices_BK: jax.Array, w_LD: jax.Array) -> jax.Array:
    """See `pallas_kernels.dense_sparse_matmul.vjp.dense_sparse_matmul`."""
    dtype = jnp.result_type(values_BK, w_LD)
    (out_BD,) = gathered.products(values_BK, indices_BK, w_LD, None, out_dtype=dtype)
    return out_BD
