"""From group sketches to the exact top-k: the part that the GPU and TPU kernels share.

A kernel's matmul leaves, of every group of latents, a sketch: the two largest pre-activations,
where they are, and the third largest value. Every entry of the top k lies in one of the k groups
with the largest maxima, so the first two of each are the candidates. They are the whole answer
unless more than two entries of a chosen group, or an entry of an equally good group that was not
chosen, reach the k-th candidate. Tokens where that happens are rare; they are redone from all their
pre-activations, a block at a time, in as many blocks as they fill: nothing can overflow.

Why it is exact: let t be the k-th largest candidate and m the k-th largest group maximum, m <= t.
What is no candidate lies either in a chosen group, third or later, and is < t where no third value
reaches t; or in another group, and is <= m. The latter can only compete (tie) if m = t and another
group's maximum is m as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.top_k.api import top_k

POSITION_BITS = 8  # a group has at most 2**8 latents

# Tokens redone at once: about as many as there are when latents fall into groups at random, since
# one token costs as much as a block of them; and no more than their pre-activations may fill.
_FALLBACK_SHARE = 128
_FALLBACK_TOKENS = 64
_FALLBACK_BYTES = 2**27

_SELECT_LIMIT = 128  # XLA on GPUs selects up to so many of a row; to find more, it sorts the row


class Sketch(NamedTuple):
    """What is kept of every group of latents, for B tokens and G groups.

    Positions within a group ascend with the latent's index; of equal values the first comes first.
    No value is NaN: a group that holds one has +inf for all three. Where a value is -inf its
    position means nothing.

    Attributes:
      largest_BG, second_BG, third_BG: `[B, G]` float32, descending.
      positions_BG: `[B, G]` int32, the largest's position + (the second's << POSITION_BITS).
    """

    largest_BG: jax.Array
    second_BG: jax.Array
    third_BG: jax.Array
    positions_BG: jax.Array


# Latent index of a position within a group; takes arrays of one shape.
LatentOf = Callable[[jax.Array, jax.Array], jax.Array]


def encode(
    x_BD: jax.Array,
    w_LD: jax.Array,
    b_L: jax.Array,
    k: int,
    *,
    sketch: Callable[[jax.Array, jax.Array], Sketch],
    latent_of: LatentOf,
    tokens_per_block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The top k from sketches, exact; see `pallas_kernels.topk_encode.vjp.topk_encode`.

    Args:
      x_BD, w_LD, b_L, k: of the operation.
      sketch: makes the `Sketch` of a block of tokens `[tokens_per_block, D]`, given also the bias
        `[L]` in float32.
      latent_of: of that sketch.
      tokens_per_block: tokens sketched at once; what bounds memory.

    Returns:
      values `[B, k]` float32, indices `[B, k]` int32, and the number of tokens redone.
    """
    n_tokens, d_model = x_BD.shape
    b_L = b_L.astype(jnp.float32)

    def block(x_bD):
        return select(sketch(x_bD, b_L), latent_of, k)

    n_blocks = -(-n_tokens // tokens_per_block)
    padded_BD = jnp.pad(x_BD, ((0, n_blocks * tokens_per_block - n_tokens), (0, 0)))
    parts = lax.map(block, padded_BD.reshape(n_blocks, tokens_per_block, d_model))
    values_BK, indices_BK, unsettled_B = (
        part.reshape(-1, *part.shape[2:])[:n_tokens] for part in parts
    )
    return redo(x_BD, w_LD, b_L, values_BK, indices_BK, unsettled_B)


def select(sketch: Sketch, latent_of: LatentOf, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k largest candidates of every token, and whether they may not be the top k.

    Returns:
      values `[B, k]` float32, indices `[B, k]` int32 (both ordered as `top_k` orders them), and
      `[B]` bool, true where the token must be redone.
    """
    n_groups = sketch.largest_BG.shape[1]
    # One more than needed shows whether the choice of the k-th group was arbitrary.
    looked_at = k if k in (_SELECT_LIMIT, n_groups) else k + 1
    maxima_BK, groups_BK = _largest(sketch.largest_BG, looked_at)
    groups_BK = groups_BK[:, :k]

    def chosen(field_BG):
        return jnp.take_along_axis(field_BG, groups_BK, axis=1, mode="clip")

    positions_BK = chosen(sketch.positions_BG)
    latents_BC = jnp.concatenate(
        [
            latent_of(groups_BK, positions_BK & (2**POSITION_BITS - 1)),
            latent_of(groups_BK, positions_BK >> POSITION_BITS),
        ],
        axis=1,
    )
    values_BC = jnp.concatenate([maxima_BK[:, :k], chosen(sketch.second_BG)], axis=1)
    negated_BC, latents_BC = lax.sort((-values_BC, latents_BC), num_keys=2, is_stable=False)
    values_BK, indices_BK = -negated_BC[:, :k], latents_BC[:, :k]

    least_B = values_BK[:, -1]
    crowded_B = chosen(sketch.third_BG).max(axis=1) >= least_B
    if looked_at > k:
        tied_B = maxima_BK[:, k] == least_B
    else:
        tied_B = (sketch.largest_BG >= least_B[:, None]).sum(axis=1) > k
    return values_BK, indices_BK, crowded_B | tied_B


def redo(
    x_BD: jax.Array,
    w_LD: jax.Array,
    b_L: jax.Array,
    values_BK: jax.Array,
    indices_BK: jax.Array,
    unsettled_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Selects anew, from all their pre-activations, for the tokens that are not settled."""
    n_tokens, k = values_BK.shape
    tokens = min(
        max(n_tokens // _FALLBACK_SHARE, _FALLBACK_TOKENS),
        max(_FALLBACK_BYTES // (4 * len(w_LD)), 8),
        n_tokens,
    )
    count = unsettled_B.sum(dtype=jnp.int32)
    # Unsettled tokens first, then an index out of range, which scatters drop.
    order_B = jnp.nonzero(unsettled_B, size=n_tokens, fill_value=n_tokens)[0].astype(jnp.int32)
    order_B = jnp.pad(order_B, (0, tokens), constant_values=n_tokens)

    def block(state):
        start, values_BK, indices_BK = state
        chosen_F = lax.dynamic_slice_in_dim(order_B, start, tokens)
        h_FL = lax.dot_general(
            x_BD.at[chosen_F].get(mode="clip"),
            w_LD,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        values_FK, indices_FK = top_k(h_FL + b_L, k)
        return (
            start + tokens,
            values_BK.at[chosen_F].set(values_FK, mode="drop", unique_indices=True),
            indices_BK.at[chosen_F].set(indices_FK, mode="drop", unique_indices=True),
        )

    start = jnp.zeros((), jnp.int32)
    _, values_BK, indices_BK = lax.while_loop(
        lambda state: state[0] < count, block, (start, values_BK, indices_BK)
    )
    return values_BK, indices_BK, count


def _largest(x_BG: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest per row, in whatever order among equals: on GPUs, order costs a full sort."""
    if jax.__version_info__ < (0, 11):
        return lax.top_k(x_BG, k)
    return lax.top_k(x_BG, k, is_stable=False)
