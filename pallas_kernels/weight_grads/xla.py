"""Weight gradients as scatter-adds of whole rows: k of them, or over blocks of a list of pairs."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.pair_list import xla as pair_list

# XLA on CPU runs a loop's body on one core if it is short; this many rounds of it are not.
_UNROLL = 8


def weight_grads(values_BK, d_values_BK, indices_BK, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads`."""
    w_dec_LD, w_enc_LD, bias_L = totals or _zeros((values_BK, d_values_BK), e_BD, x_BD, n)
    k = indices_BK.shape[1]

    def add_one(j, matrices):
        index_B = lax.dynamic_index_in_dim(indices_BK, j, axis=1, keepdims=False)

        def added(total_LD, coefficients_BK, rows_BD):
            one_B1 = lax.dynamic_slice_in_dim(coefficients_BK, j, 1, axis=1)
            return total_LD.at[index_B].add(one_B1.astype(total_LD.dtype) * rows_BD)

        w_dec_LD, w_enc_LD = matrices
        return added(w_dec_LD, values_BK, e_BD), added(w_enc_LD, d_values_BK, x_BD)

    # Both at once, because a scatter-add takes one core and two there are.
    w_dec_LD, w_enc_LD = lax.fori_loop(
        0, k, add_one, (w_dec_LD, w_enc_LD), unroll=min(_UNROLL, max(k, 1))
    )
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
