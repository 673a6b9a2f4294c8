"""The list of (token, latent) pairs."""

from typing import NamedTuple

import jax


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
