"""A sparse code as one list of its (token, latent) pairs, and the products a training step needs.

Where the latents are split over many shards, each shard keeps few of the candidates it offers: at
16 M latents on 512 shards and k = 256, half a latent per token out of six. Padded `[B, C]` codes
would touch every slot; the list touches the pairs that are there. Its arrays are as long as all
slots, so nothing can overflow; the products run over blocks of it, as many as are filled.
"""

from typing import NamedTuple

import jax

from pallas_kernels import dispatch
from pallas_kernels.pair_list import reference, xla


class Pairs(NamedTuple):
    """Kept pairs, sorted by (latent, token); unused entries follow.

    Attributes:
      values_P: value of the pair; 0 where unused.
      tokens_P: int32 in [0, B); B where unused.
      latents_P: int32 in [0, L); L where unused.
      count: int32 scalar, pairs in use.
    """

    values_P: jax.Array
    tokens_P: jax.Array
    latents_P: jax.Array
    count: jax.Array


_COMPACT = {"reference": reference.compact, "xla": xla.compact}
_DECODE = {"reference": reference.decode, "xla": xla.decode}
_DOT = {"reference": reference.dot, "xla": xla.dot}
_ADD_OUTER = {"reference": reference.add_outer, "xla": xla.add_outer}


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
    """
    fn = dispatch.choose("pair_list.compact", implementation, _COMPACT)
    return Pairs(*fn(kept_BC, values_BC, indices_BC, n_latents))


def decode(
    pairs: Pairs, w_LD: jax.Array, n_tokens: int, *, implementation: str | None = None
) -> jax.Array:
    """`out[b] = sum over pairs (b, l) of value * w[l]`: `[n_tokens, D]`, in the promoted dtype."""
    fn = dispatch.choose("pair_list.decode", implementation, _DECODE)
    return fn(*pairs, w_LD, n_tokens)


def dot(
    pairs: Pairs, a_BD: jax.Array, w_LD: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """`out[p] = <a[token p], w[latent p]>`: `[P]` in the dtype of the values; 0 where unused."""
    fn = dispatch.choose("pair_list.dot", implementation, _DOT)
    return fn(*pairs, a_BD, w_LD)


def add_outer(
    total_LD: jax.Array, pairs: Pairs, a_BD: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """`total[l] + sum over pairs (b, l) of value * a[b]`: `[L, D]` in the dtype of `total_LD`."""
    fn = dispatch.choose("pair_list.add_outer", implementation, _ADD_OUTER)
    return fn(total_LD, *pairs, a_BD)
