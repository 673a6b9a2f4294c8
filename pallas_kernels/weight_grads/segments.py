"""The pairs of every latent as one segment of a sorted list, long segments cut into pieces.

A kernel sums a latent's pairs one after the other, so that the sum does not depend on timing. A
latent that half of all tokens keep would then occupy one block long after all others are done.
Segments longer than `LONGEST` are therefore cut into pieces of at most that many pairs: the pieces
are summed like segments of their own, and the latent adds up its pieces, in order.

Plain JAX, shared by the kernels of all devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LONGEST = 512


class Sorted(NamedTuple):
    """Pairs in the order (latent, token).

    Attributes:
      latents_P: int32, ascending.
      tokens_P: int32, ascending within a latent.
      order_P: int32 position of every pair in the flat code: `values.reshape(-1)[order_P]`.
    """

    latents_P: jax.Array
    tokens_P: jax.Array
    order_P: jax.Array


class Segments(NamedTuple):
    """Where the pairs of every latent lie in a sorted list: `starts[l] <= p < ends[l]`.

    A latent whose segment is too long has none of its own, but the pieces
    `piece_offsets[l] <= e < piece_offsets[l + 1]`, and piece e has the pairs
    `piece_starts[e] <= p < piece_ends[e]`. Unused pieces are empty and come last.

    Attributes:
      starts_L, ends_L: int32.
      piece_offsets: int32 `[L + 1]`.
      piece_starts_E, piece_ends_E: int32; E = 0 where no list of this length has a long segment.
    """

    starts_L: jax.Array
    ends_L: jax.Array
    piece_offsets: jax.Array
    piece_starts_E: jax.Array
    piece_ends_E: jax.Array


def sort_pairs(indices_BK: jax.Array) -> Sorted:
    """Sorts the pairs of a padded code by (latent, token).

    Args:
      indices_BK: `[B, K]` int32.

    Returns:
      `Sorted` of length B * K.
    """
    flat_P = indices_BK.reshape(-1)
    # One key and one payload: XLA hands exactly this to the vendor's radix sort on GPUs. Values
    # follow by a gather, which moves less than a comparison sort of them would.
    position_P = lax.iota(jnp.int32, flat_P.size)
    latents_P, order_P = lax.sort((flat_P, position_P), num_keys=1, is_stable=True)
    return Sorted(latents_P, order_P // max(indices_BK.shape[1], 1), order_P)


def segments(latents_P: jax.Array, n: int, *, longest: int = LONGEST) -> Segments:
    """Cuts a sorted list into the segments of its latents.

    Args:
      latents_P: `[P]` int32, ascending; entries of n and above belong to no latent.
      n: latents.
      longest: pairs in a segment, at most.

    Returns:
      `Segments`, whose number of pieces E depends on P and `longest` alone.
    """
    # Unrolled, the binary search is one fused kernel instead of a loop of small ones.
    offsets = jnp.searchsorted(
        latents_P, jnp.arange(n + 1, dtype=jnp.int32), method="scan_unrolled"
    ).astype(jnp.int32)
    starts_L, ends_L = offsets[:-1], offsets[1:]
    length_L = ends_L - starts_L
    is_long_L = length_L > longest
    pieces_L = jnp.where(is_long_L, (length_L + longest - 1) // longest, 0)
    piece_offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pieces_L)])
    piece_offsets = piece_offsets.astype(jnp.int32)

    piece_E = jnp.arange(most_pieces(len(latents_P), longest), dtype=jnp.int32)
    owner_E = jnp.searchsorted(piece_offsets, piece_E, side="right", method="scan_unrolled") - 1
    is_used_E = piece_E < piece_offsets[-1]
    owner_E = jnp.minimum(owner_E, n - 1)
    start_E = starts_L[owner_E] + (piece_E - piece_offsets[owner_E]) * longest
    start_E = jnp.where(is_used_E, start_E, 0)
    end_E = jnp.where(is_used_E, jnp.minimum(start_E + longest, ends_L[owner_E]), 0)
    return Segments(starts_L, jnp.where(is_long_L, starts_L, ends_L), piece_offsets, start_E, end_E)


def most_pieces(n_pairs: int, longest: int = LONGEST) -> int:
    """The most pieces that a list of `n_pairs` can have.

    A segment of c > longest pairs has ceil(c / longest) <= 2 * floor(c / longest) pieces.
    """
    return 0 if n_pairs <= longest else 2 * (n_pairs // longest)
