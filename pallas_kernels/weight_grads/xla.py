"""Weight gradients as scatter-adds of whole rows: k of them, or over blocks of a list of pairs."""

import jax.numpy as jnp

from pallas_kernels.pair_list import xla as pair_list
from pallas_kernels.sparse_transpose_matmul import xla as transpose


def weight_grads(values_BK, d_values_BK, indices_BK, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads`."""
    w_dec_LD, w_enc_LD, bias_L = totals or _zeros((values_BK, d_values_BK), e_BD, x_BD, n)
    w_dec_LD = transpose.sparse_transpose_matmul(values_BK, indices_BK, e_BD, n, w_dec_LD)
    w_enc_LD = transpose.sparse_transpose_matmul(d_values_BK, indices_BK, x_BD, n, w_enc_LD)
    bias_L = bias_L.at[indices_BK.reshape(-1)].add(d_values_BK.reshape(-1).astype(bias_L.dtype))
    return w_dec_LD, w_enc_LD, bias_L


def weight_grads_of_pairs(pairs, d_values_P, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads_of_pairs`."""
    w_dec_LD, w_enc_LD, bias_L = totals or _zeros((pairs.values_P, d_values_P), e_BD, x_BD, n)
    where = (pairs.tokens_P, pairs.latents_P, pairs.count)
    w_dec_LD = pair_list.add_outer(w_dec_LD, pairs.values_P, *where, e_BD)
    w_enc_LD = pair_list.add_outer(w_enc_LD, d_values_P, *where, x_BD)
    bias_L = bias_L.at[pairs.latents_P].add(
        d_values_P.astype(bias_L.dtype), mode="drop", indices_are_sorted=True
    )
    return w_dec_LD, w_enc_LD, bias_L


def _zeros(coefficients, e_BD, x_BD, n: int):
    dtype = jnp.result_type(*coefficients, e_BD, x_BD, jnp.float32)
    return (*(jnp.zeros((n, e_BD.shape[1]), dtype) for _ in range(2)), jnp.zeros(n, dtype))
