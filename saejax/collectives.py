"""Every collective of the training step, with the gradient each one stands for.

All functions run on local shards inside `mesh.per_device`. The loss is computed in full on every
latent shard of a data row from the same reduced arrays, so the gradient of a reduction over
'latent' is the identity, and what is shared by the shards must sum its gradients: the two rules of
tensor parallelism, stated here as custom gradients rather than inferred.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import top_k
from saejax.mesh import DATA, LATENT


def gather_tokens(x_bD: jax.Array) -> jax.Array:
    """This data row's tokens `[B, D]` from the slices its latent shards were fed."""
    return lax.all_gather(x_bD, LATENT, axis=0, tiled=True)


def latent_shards() -> int:
    """Number of shards along 'latent'."""
    return lax.axis_size(LATENT)


@jax.custom_vjp
def sum_over_latents(partial: jax.Array) -> jax.Array:
    """Sum of the shards' partial results; its gradient passes to each of them unchanged."""
    return lax.psum(partial, LATENT)


sum_over_latents.defvjp(lambda x: (sum_over_latents(x), None), lambda _, g: (g,))


@jax.custom_vjp
def share_over_latents(replicated: jax.Array) -> jax.Array:
    """The same array on every shard; its gradient is the sum of what the shards make of it."""
    return replicated


share_over_latents.defvjp(lambda x: (x, None), lambda _, g: (lax.psum(g, LATENT),))


def reduce_over_latents(x: jax.Array) -> jax.Array:
    """Plain sum over 'latent', for counts and for gradients already taken."""
    return lax.psum(x, LATENT)


def reduce_over_data(tree):
    """Sum over 'data' of every leaf, for gradients and for sums over tokens."""
    return jax.tree.map(lambda x: lax.psum(x, DATA), tree)


def any_over_data(flag: jax.Array) -> jax.Array:
    """Logical or over 'data'."""
    return lax.pmax(flag.astype(jnp.int32), DATA) > 0


def largest_over_latents(count: jax.Array) -> jax.Array:
    """Maximum over 'latent'; makes a branch index agree on every shard."""
    return lax.pmax(count, LATENT)


def keep_global_top_k(values_BC: jax.Array, k: int) -> jax.Array:
    """Which of this shard's candidates are among the k largest of all shards.

    Exact as long as every shard offers min(k, its latents) candidates. Only values travel: the
    k-th candidate's value and its place in shard-major order decide, so that ties fall to the
    lowest global latent index, as in an unsharded top-k (Gao et al. 2024, App. D).

    Args:
      values_BC: `[B, C]`, candidates of this shard, sorted by (value descending, index ascending).
      k: how many survive over all shards.

    Returns:
      `[B, C]` bool.
    """
    n_candidates = values_BC.shape[1]
    if latent_shards() * n_candidates <= k:
        return jnp.ones(values_BC.shape, bool)
    all_values = lax.all_gather(values_BC, LATENT, axis=1, tiled=True)
    kept_BK, position_BK = top_k(all_values, k)
    threshold_B1, last_B1 = kept_BK[:, -1:], position_BK[:, -1:]
    first = lax.axis_index(LATENT) * n_candidates
    own_position_C = first + jnp.arange(n_candidates, dtype=position_BK.dtype)
    tied = (values_BC == threshold_B1) & (own_position_C[None, :] <= last_B1)
    # A NaN compares false with everything; keep it, so that it surfaces in the loss.
    return (values_BC > threshold_B1) | tied | jnp.isnan(values_BC)
