"""A sparse code as one list of its (token, latent) pairs, and the products a training step needs.

Where the latents are split over many shards, each shard keeps few of the candidates it offers: at
16 M latents on 512 shards and k = 256, half a latent per token out of six. Padded `[B, C]` codes
would touch every slot; the list touches the pairs that are there. Its arrays are as long as all
slots, so nothing can overflow; the products run over blocks of it, as many as are filled.

By "xla", sums have an order that does not depend on timing; on a GPU, `decode` sorts the list by
token for it. No product has a reverse derivative: how many blocks there are is known at run time.
"""

import jax

from pallas_kernels import checks, dispatch
from pallas_kernels.pair_list.pairs import Pairs

_AVAILABLE = ("xla", "reference")


def compact(
    kept_BC: jax.Array,
    values_BC: jax.Array,
    indices_BC: jax.Array,
    n_latents: int,
    *,
    implementation: str | None = None,
) -> Pairs:
    """The list of the kept slots of a padded code.

    Args:
      kept_BC: `[B, C]` bool.
      values_BC: `[B, C]`.
      indices_BC: `[B, C]` int32 in [0, n_latents), distinct within the kept ones of a row.
      n_latents: L.
      implementation: "xla", "reference", or None.

    Returns:
      `Pairs` of length P >= B * C.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype; so for all functions here.
    """
    op = "pair_list.compact"
    checks.array(op, "kept_BC", kept_BC, (None, None), "bool")
    checks.array(op, "values_BC", values_BC, kept_BC.shape)
    checks.array(op, "indices_BC", indices_BC, kept_BC.shape, "int32")
    checks.whole(op, "n_latents", n_latents)
    arrays = (kept_BC, values_BC, indices_BC, n_latents)
    return Pairs(*dispatch.call(op, implementation, _AVAILABLE, *arrays))


def decode(
    pairs: Pairs, w_LD: jax.Array, n_tokens: int, *, implementation: str | None = None
) -> jax.Array:
    """`out[b] = sum over pairs (b, l) of value * w[l]`: `[n_tokens, D]`, in the promoted dtype."""
    op = "pair_list.decode"
    checks.pairs(op, pairs)
    checks.array(op, "w_LD", w_LD, (None, None))
    checks.whole(op, "n_tokens", n_tokens, least=0)
    checks.result(op, n_tokens, w_LD.shape[1])
    return dispatch.call(op, implementation, _AVAILABLE, *pairs, w_LD, n_tokens)


def dot(
    pairs: Pairs, a_BD: jax.Array, w_LD: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """`out[p] = <a[token p], w[latent p]>`: `[P]` in the dtype of the values; 0 where unused."""
    op = "pair_list.dot"
    checks.pairs(op, pairs)
    checks.array(op, "a_BD", a_BD, (None, None))
    checks.array(op, "w_LD", w_LD, (None, a_BD.shape[1]))
    return dispatch.call(op, implementation, _AVAILABLE, *pairs, a_BD, w_LD)


def add_outer(
    total_LD: jax.Array, pairs: Pairs, a_BD: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """`total[l] + sum over pairs (b, l) of value * a[b]`: `[L, D]` in the dtype of `total_LD`."""
    op = "pair_list.add_outer"
    checks.array(op, "total_LD", total_LD, (None, None))
    checks.pairs(op, pairs)
    checks.array(op, "a_BD", a_BD, (None, total_LD.shape[1]))
    return dispatch.call(op, implementation, _AVAILABLE, total_LD, *pairs, a_BD)
