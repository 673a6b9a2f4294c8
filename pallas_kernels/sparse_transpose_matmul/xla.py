"""Transposed sparse decode as k scatter-adds of whole rows.

Column j of the code touches every token once, so each pass adds `[B, D]` scaled rows into the
`[L, D]` sum. On a CPU the scatter is sequential, hence deterministic; for GPUs, whose scatter is
not, the pairs are sorted and added as a list of pairs is. (Adding latent by latent, as
`weight_grads` does for training, is faster where pairs outnumber latents.)
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import ordered
from pallas_kernels.pair_list import xla as pair_list
from pallas_kernels.weight_grads import segments


def sparse_transpose_matmul(
    values_BK: jax.Array,
    indices_BK: jax.Array,
    a_BD: jax.Array,
    n: int,
    total_LD: jax.Array | None = None,
) -> jax.Array:
    """See `pallas_kernels.sparse_transpose_matmul.api.sparse_transpose_matmul`."""
    dtype = jnp.result_type(values_BK, a_BD) if total_LD is None else total_LD.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    total_LD = jnp.zeros((n, a_BD.shape[1]), wide) if total_LD is None else total_LD.astype(wide)
    if ordered.needed():
        pairs = segments.sort_pairs(indices_BK)
        values_P, count = values_BK.reshape(-1)[pairs.order_P], jnp.int32(indices_BK.size)
        where = (pairs.tokens_P, pairs.latents_P, count)
        return pair_list.add_outer(total_LD, values_P, *where, a_BD).astype(dtype)

    def add_one(j, total_LD):
        value_B1 = lax.dynamic_slice_in_dim(values_BK, j, 1, axis=1)
        index_B = lax.dynamic_index_in_dim(indices_BK, j, axis=1, keepdims=False)
        return total_LD.at[index_B].add(value_B1.astype(wide) * a_BD)

    return lax.fori_loop(0, indices_BK.shape[1], add_one, total_LD).astype(dtype)
