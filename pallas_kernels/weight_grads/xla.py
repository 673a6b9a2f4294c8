"""Weight gradients as scatter-adds of whole rows, of one latent after the other where that pays."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch, ordered
from pallas_kernels.pair_list import xla as pair_list
from pallas_kernels.pair_list.pairs import Pairs
from pallas_kernels.weight_grads import segments

# XLA on CPU runs a loop's body on one core if it is short; this many rounds of it are not.
_UNROLL = 8
# Pairs of a round: their scaled rows stay in the cache between being made and being added.
_BLOCK = 256
_KEYS = 2**32


def weight_grads(values_BK, d_values_BK, indices_BK, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads`."""
    totals = _totals(totals, (values_BK, d_values_BK), e_BD, x_BD, n)
    if ordered.needed():
        return _add_list(totals, values_BK, d_values_BK, indices_BK, e_BD, x_BD)
    # A TPU adds a batch of rows at once; its rounds should be few.
    on_cpu = dispatch.current_target().platform == "cpu"
    parts = _parts(*indices_BK.shape, n) if on_cpu else None
    add = _add_columns if parts is None else _add_sorted
    if (parts or 1) == 1:
        return add(totals, values_BK, d_values_BK, indices_BK, e_BD, x_BD)
    size = len(indices_BK) // parts

    def add_part(i, totals):
        arrays = (values_BK, d_values_BK, indices_BK, e_BD, x_BD)
        return add(totals, *(lax.dynamic_slice_in_dim(a, i * size, size) for a in arrays))

    return lax.fori_loop(0, parts, add_part, totals)


def _parts(n_tokens: int, k: int, n: int) -> int | None:
    """The fewest equal parts of which (latent, pair) is one key; None if too few pairs remain."""
    for parts in range(1, n_tokens + 1):
        pairs = n_tokens * k // parts
        if pairs < n:  # most latents have one pair or none, and nothing to gain
            return None
        if n_tokens % parts == 0 and n * pairs <= _KEYS:
            return parts
    return None


def _add_sorted(totals, values_BK, d_values_BK, indices_BK, e_BD, x_BD):
    """Latent by latent, so that the row that is added to is in the cache."""
    w_dec_LD, w_enc_LD, bias_L = totals
    # One key, since XLA on CPU sorts keys with a payload four times slower.
    n_pairs = np.uint32(indices_BK.size)
    keys_P = indices_BK.reshape(-1).astype(jnp.uint32) * n_pairs
    keys_P = lax.sort(keys_P + jnp.arange(n_pairs, dtype=jnp.uint32))
    # The last round is filled up with pairs of no latent.
    fill = (0, -indices_BK.size % _BLOCK)
    latents_P = jnp.pad((keys_P // n_pairs).astype(jnp.int32), fill, constant_values=len(bias_L))
    pairs_P = jnp.pad((keys_P % n_pairs).astype(jnp.int32), fill)
    values_P, d_values_P = values_BK.reshape(-1), d_values_BK.reshape(-1)

    def add_block(i, matrices):
        def block(array):
            return lax.dynamic_slice_in_dim(array, i * _BLOCK, _BLOCK)

        latents, pairs = block(latents_P), block(pairs_P)
        tokens = pairs // indices_BK.shape[1]

        def added(total_LD, coefficients_P, rows_BD):
            scaled = coefficients_P[pairs][:, None].astype(total_LD.dtype) * rows_BD[tokens]
            scaled = scaled.astype(total_LD.dtype)
            return total_LD.at[latents].add(scaled, mode="drop", indices_are_sorted=True)

        w_dec_LD, w_enc_LD = matrices
        return added(w_dec_LD, values_P, e_BD), added(w_enc_LD, d_values_P, x_BD)

    # Both at once, because a scatter-add takes one core and two there are.
    rounds = len(pairs_P) // _BLOCK
    w_dec_LD, w_enc_LD = lax.fori_loop(
        0, rounds, add_block, (w_dec_LD, w_enc_LD), unroll=min(_UNROLL, rounds)
    )
    d_values_P = d_values_P[pairs_P].astype(bias_L.dtype)
    bias_L = bias_L.at[latents_P].add(d_values_P, mode="drop", indices_are_sorted=True)
    return w_dec_LD, w_enc_LD, bias_L


def _add_columns(totals, values_BK, d_values_BK, indices_BK, e_BD, x_BD):
    """A latent of every token at a time."""
    w_dec_LD, w_enc_LD, bias_L = totals
    k = indices_BK.shape[1]

    def add_one(j, matrices):
        index_B = lax.dynamic_index_in_dim(indices_BK, j, axis=1, keepdims=False)

        def added(total_LD, coefficients_BK, rows_BD):
            one_B1 = lax.dynamic_slice_in_dim(coefficients_BK, j, 1, axis=1)
            scaled = one_B1.astype(total_LD.dtype) * rows_BD
            return total_LD.at[index_B].add(scaled.astype(total_LD.dtype))

        w_dec_LD, w_enc_LD = matrices
        return added(w_dec_LD, values_BK, e_BD), added(w_enc_LD, d_values_BK, x_BD)

    w_dec_LD, w_enc_LD = lax.fori_loop(
        0, k, add_one, (w_dec_LD, w_enc_LD), unroll=min(_UNROLL, max(k, 1))
    )
    bias_L = bias_L.at[indices_BK.reshape(-1)].add(d_values_BK.reshape(-1).astype(bias_L.dtype))
    return w_dec_LD, w_enc_LD, bias_L


def _add_list(totals, values_BK, d_values_BK, indices_BK, e_BD, x_BD):
    """As one list of pairs, whose sums have one order on GPUs too."""
    found = segments.sort_pairs(indices_BK)
    values_P, d_values_P = (a.reshape(-1)[found.order_P] for a in (values_BK, d_values_BK))
    count = jnp.int32(indices_BK.size)
    pairs = Pairs(values_P, found.tokens_P, found.latents_P, count)
    return weight_grads_of_pairs(pairs, d_values_P, e_BD, x_BD, len(totals[2]), totals=totals)


def weight_grads_of_pairs(pairs, d_values_P, e_BD, x_BD, n: int, *, totals=None):
    """See `pallas_kernels.weight_grads.api.weight_grads_of_pairs`."""
    w_dec_LD, w_enc_LD, bias_L = _totals(totals, (pairs.values_P, d_values_P), e_BD, x_BD, n)
    where = (pairs.tokens_P, pairs.latents_P, pairs.count)
    w_dec_LD = pair_list.add_outer(w_dec_LD, pairs.values_P, *where, e_BD)
    w_enc_LD = pair_list.add_outer(w_enc_LD, d_values_P, *where, x_BD)
    bias_L = ordered.add_runs(bias_L, d_values_P.astype(bias_L.dtype), pairs.latents_P)
    return w_dec_LD, w_enc_LD, bias_L


def _totals(totals, coefficients, e_BD, x_BD, n: int):
    """As a plain tuple, which is what loops carry."""
    if totals is not None:
        return tuple(totals)
    dtype = jnp.result_type(*coefficients, e_BD, x_BD, jnp.float32)
    return (*(jnp.zeros((n, e_BD.shape[1]), dtype) for _ in range(2)), jnp.zeros(n, dtype))
