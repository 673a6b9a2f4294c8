"""Products with a list of pairs, a block of rows at a time, as many blocks as are filled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import ordered

# Gathered rows of a block: enough work per pass, little memory beside the matrices. On a GPU, where
# a block takes a scan's rounds, each a launch, nothing else bounds it.
_BLOCK_BYTES = 2**26
_MOST_PAIRS = 4096


def compact(kept_BC, values_BC, indices_BC, n_latents):
    """See `pallas_kernels.pair_list.api.compact`."""
    n_tokens, n_slots = kept_BC.shape
    kept = kept_BC.reshape(-1)
    latents = jnp.where(kept, indices_BC.reshape(-1).astype(jnp.int32), n_latents)
    tokens = lax.broadcasted_iota(jnp.int32, (n_tokens, n_slots), 0).reshape(-1)
    # Stable, so that the pairs of a latent stay in the order of their tokens.
    latents, tokens, values = lax.sort(
        (latents, tokens, values_BC.reshape(-1)), num_keys=1, is_stable=True
    )
    used = latents < n_latents
    return (
        jnp.where(used, values, 0),
        jnp.where(used, tokens, n_tokens),
        latents,
        kept.sum(dtype=jnp.int32),
    )


def _over_blocks(count, arrays, width: int, start, body: Callable):
    """Folds `body(carry, first, *blocks)` over the filled blocks of `arrays` `[P]`.

    The last block is moved back to end with the arrays; `body` gets a mask of what is new in it.
    """
    length = len(arrays[0])
    if not length:
        return start
    most = length if ordered.needed() else _MOST_PAIRS
    block = min(most, max(_BLOCK_BYTES // (4 * width), 8), length)

    def one(i, carry):
        first = jnp.minimum(i * block, length - block)
        new = first + jnp.arange(block) >= i * block
        return body(carry, first, new, *(lax.dynamic_slice(a, (first,), (block,)) for a in arrays))

    return lax.fori_loop(0, (count + block - 1) // block, one, start)


def decode(values_P, tokens_P, latents_P, count, w_LD, n_tokens) -> jax.Array:
    """See `pallas_kernels.pair_list.api.decode`."""
    dtype = jnp.result_type(values_P, w_LD)
    wide = jnp.promote_types(dtype, jnp.float32)
    by_token = ordered.needed()

    def body(total_BD, first, new, values, tokens, latents):
        del first
        rows = w_LD.at[latents].get(mode="clip", indices_are_sorted=not by_token).astype(wide)
        scaled = jnp.where(new, values, 0)[:, None].astype(wide) * rows
        if by_token:
            return ordered.add_runs(total_BD, scaled, tokens)
        return total_BD.at[tokens].add(scaled, mode="drop")

    start = jnp.zeros((n_tokens, w_LD.shape[1]), wide)
    arrays = (values_P, tokens_P, latents_P)
    if by_token:  # the unused ones stay last
        position_P = lax.iota(jnp.int32, len(tokens_P))
        tokens_P, order_P = lax.sort((tokens_P, position_P), num_keys=1, is_stable=True)
        arrays = (values_P[order_P], tokens_P, latents_P[order_P])
    return _over_blocks(count, arrays, w_LD.shape[1], start, body).astype(dtype)


def dot(values_P, tokens_P, latents_P, count, a_BD, w_LD) -> jax.Array:
    """See `pallas_kernels.pair_list.api.dot`."""
    n_tokens, dtype = len(a_BD), values_P.dtype
    wide = jnp.promote_types(dtype, jnp.float32)

    def body(out_P, first, new, tokens, latents):
        del new  # an entry computed twice is written twice
        rows = w_LD.at[latents].get(mode="clip", indices_are_sorted=True).astype(wide)
        inner = (a_BD.at[tokens].get(mode="clip").astype(wide) * rows).sum(-1).astype(dtype)
        return lax.dynamic_update_slice(out_P, jnp.where(tokens < n_tokens, inner, 0), (first,))

    start = jnp.zeros(len(values_P), dtype)
    return _over_blocks(count, (tokens_P, latents_P), w_LD.shape[1], start, body)


def add_outer(total_LD, values_P, tokens_P, latents_P, count, a_BD) -> jax.Array:
    """See `pallas_kernels.pair_list.api.add_outer`."""
    dtype = total_LD.dtype
    wide = jnp.promote_types(dtype, jnp.float32)

    def body(total_LD, first, new, values, tokens, latents):
        del first
        rows = a_BD.at[tokens].get(mode="clip").astype(wide)
        scaled = jnp.where(new, values, 0)[:, None].astype(wide) * rows
        return ordered.add_runs(total_LD, scaled, latents)

    arrays, start = (values_P, tokens_P, latents_P), total_LD.astype(wide)
    return _over_blocks(count, arrays, a_BD.shape[1], start, body).astype(dtype)
