"""Products with a list of pairs, from their definition."""

import jax
import jax.numpy as jnp
from jax import lax


def compact(kept_BC, values_BC, indices_BC, n_latents):
    """See `pallas_kernels.pair_list.api.compact`."""
    n_tokens, n_slots = kept_BC.shape
    kept = kept_BC.reshape(-1)
    latents = jnp.where(kept, indices_BC.reshape(-1), n_latents)
    tokens = jnp.where(kept, jnp.repeat(jnp.arange(n_tokens), n_slots), n_tokens)
    order = jnp.lexsort((tokens, latents))
    return (
        jnp.where(kept, values_BC.reshape(-1), 0)[order],
        tokens[order].astype(jnp.int32),
        latents[order].astype(jnp.int32),
        kept.sum(dtype=jnp.int32),
    )


def decode(values_P, tokens_P, latents_P, count, w_LD, n_tokens) -> jax.Array:
    """See `pallas_kernels.pair_list.api.decode`."""
    del count  # unused entries name rows that do not exist
    dtype = jnp.result_type(values_P, w_LD)
    code_BL = _code((n_tokens, len(w_LD)), values_P, tokens_P, latents_P, dtype)
    return _matmul(code_BL, w_LD).astype(dtype)


def dot(values_P, tokens_P, latents_P, count, a_BD, w_LD) -> jax.Array:
    """See `pallas_kernels.pair_list.api.dot`."""
    del count
    all_BL = _matmul(a_BD, w_LD.T).astype(values_P.dtype)
    return all_BL.at[tokens_P, latents_P].get(mode="fill", fill_value=0)


def add_outer(total_LD, values_P, tokens_P, latents_P, count, a_BD) -> jax.Array:
    """See `pallas_kernels.pair_list.api.add_outer`."""
    del count
    dtype = total_LD.dtype
    code_BL = _code((len(a_BD), len(total_LD)), values_P, tokens_P, latents_P, dtype)
    return (total_LD + _matmul(code_BL.T, a_BD)).astype(dtype)


def _code(shape, values_P, tokens_P, latents_P, dtype) -> jax.Array:
    zero_BL = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
    return zero_BL.at[tokens_P, latents_P].add(values_P.astype(zero_BL.dtype), mode="drop")


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """At the highest precision, in float32 or wider."""
    wide = jnp.result_type(a, b, jnp.float32)
    return jnp.matmul(a.astype(wide), b.astype(wide), precision=lax.Precision.HIGHEST)
