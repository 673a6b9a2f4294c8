"""Every explicit collective; those of the training step under the names of the plan's table.

All functions run on local shards inside `mesh.per_device`. Tokens are held in one of two ways: each
device its own rows `[b, D]`, or all the rows of its data row `[B, D]`, in the order of the latent
shards. `gather_tokens` and `sum_tokens` lead from one to the other. Along an axis of one device
they return what they are given: a compiler would copy it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import top_k
from saejax.mesh import DATA, LATENT


def _named(name: str) -> Callable:
    """Marks what a function lowers to, so that a compiled program can be compared with the plan."""

    def decorate(fn):
        @functools.wraps(fn)
        def named(*args, **kwargs):
            with jax.named_scope(name):
                return fn(*args, **kwargs)

        return named

    return decorate


def latent_shards() -> int:
    """Number of shards along 'latent'."""
    return lax.axis_size(LATENT)


def shard_index() -> jax.Array:
    """This device's place along 'latent'."""
    return lax.axis_index(LATENT)


def data_rows() -> int:
    """Number of replicas along 'data'."""
    return lax.axis_size(DATA)


@_named("tokens")
def gather_tokens(x_bD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`[B, D]` in `dtype`: the data row's tokens, from the rows each latent shard was fed."""
    return _gathered(x_bD.astype(dtype))


@_named("reconstruction")
def sum_tokens(partial_BD: jax.Array) -> jax.Array:
    """`[b, D]`: the sum of all shards' partial results, each device its own rows.

    Half the bytes of an all-reduce; the residual is gathered back in the narrower compute dtype.
    """
    if latent_shards() == 1:
        return partial_BD
    return lax.psum_scatter(partial_BD, LATENT, scatter_dimension=0, tiled=True)


@_named("residual")
def gather_residual(e_bD: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`[B, D]` in `dtype`: residuals of the data row's tokens, for every shard's gradients."""
    return _gathered(e_bD.astype(dtype))


def _gathered(x_bD: jax.Array) -> jax.Array:
    if latent_shards() == 1:
        return x_bD
    return lax.all_gather(x_bD, LATENT, axis=0, tiled=True)


@_named("codes over data")
def gather_over_data(tree):
    """Every leaf of all data rows, stacked along a new leading axis."""
    return jax.tree.map(lambda x: lax.all_gather(x, DATA, axis=0), tree)


@_named("gradients over data")
def reduce_over_data(tree):
    """Sum over 'data' of every leaf.

    A reduction for each leaf: the compiler may start one while it makes another.
    """
    return _summed(tree, DATA)


@_named("sums")
def sum_over_mesh(tree):
    """Sum over every device of small leaves."""
    return _summed(tree, DATA, LATENT)


@_named("sums")
def sum_over_latents(tree):
    """Sum over 'latent' of small leaves."""
    return _summed(tree, LATENT)


def _summed(tree, *axes: str):
    axes = tuple(axis for axis in axes if lax.axis_size(axis) > 1)
    return jax.tree.map(lambda x: lax.psum(x, axes), tree) if axes else tree


@_named("fired")
def any_over_data(flag: jax.Array) -> jax.Array:
    """Logical or over 'data'."""
    if data_rows() == 1:
        return flag
    return lax.pmax(flag.astype(jnp.int32), DATA) > 0


@_named("sums")
def largest_over_latents(count: jax.Array) -> jax.Array:
    """Maximum over 'latent'; makes a branch index agree on every shard."""
    return lax.pmax(count, LATENT) if latent_shards() > 1 else count


def count_kept(values_BC: jax.Array, k: int, exchange: str = "all_to_all") -> jax.Array:
    """How many of this shard's candidates are among the k largest offered by all shards.

    Candidates come sorted, so the kept ones are the first. Only values travel: their place in
    shard-major order decides ties, which so fall to the lowest global latent index, as in an
    unsharded top-k (Gao et al. 2024, App. D). The result is the exact global top-k unless a shard
    keeps all it offers and had more to offer.

    Args:
      values_BC: `[B, C]` candidates of this shard, by (value descending, index ascending).
      k: how many are kept over all shards.
      exchange: 'all_to_all' sends each shard the candidates of its own share of the tokens and
        returns counts; 'all_gather' sends all candidates everywhere. Tokens that do not divide
        by the shards are always gathered.

    Returns:
      `[B]` int32 in [0, C].
    """
    n_tokens, n_candidates = values_BC.shape
    shards = latent_shards()
    if shards * n_candidates <= k:
        return jnp.full(n_tokens, n_candidates, jnp.int32)
    if shards == 1:
        return jnp.full(n_tokens, k, jnp.int32)
    if exchange == "all_gather" or n_tokens % shards:
        with jax.named_scope("candidates"):
            offered = lax.all_gather(values_BC, LATENT, axis=1, tiled=True)
        return _count_by_shard(offered, k, n_candidates, lax.axis_index(LATENT)[None])[:, 0]
    with jax.named_scope("candidates"):
        offered = lax.all_to_all(values_BC, LATENT, split_axis=0, concat_axis=1, tiled=True)
    counts_bS = _count_by_shard(offered, k, n_candidates, jnp.arange(shards))
    with jax.named_scope("kept counts"):
        return lax.all_to_all(counts_bS, LATENT, split_axis=1, concat_axis=0, tiled=True)[:, 0]


def _count_by_shard(
    offered: jax.Array, k: int, n_candidates: int, shards_S: jax.Array
) -> jax.Array:
    """`[B, S]`: of each token's k largest among `[B, shards * C]`, how many the shards offered."""
    _, position_BK = top_k(offered, k)
    owner_BK = position_BK // n_candidates
    return (owner_BK[:, :, None] == shards_S).sum(1, dtype=jnp.int32)


def merge_top_k(
    values_BC: jax.Array, indices_BC: jax.Array, n_latents: int, k: int
) -> tuple[jax.Array, jax.Array]:
    """Values and global indices `[B, k]` of the k largest candidates of all shards.

    Each shard merges the candidates of its own share of the tokens, then all share the result.

    Args:
      values_BC: `[B, C]` candidates of this shard, by (value descending, index ascending); B a
        multiple of the shards.
      indices_BC: `[B, C]` their latents in [0, n_latents).
      n_latents: latents of each shard.
      k: at most C * shards.

    Returns:
      By (value descending, index ascending), the same on every shard.
    """
    indices_BC = indices_BC + shard_index() * n_latents

    def by_tokens(x_BC):
        return lax.all_to_all(x_BC, LATENT, split_axis=0, concat_axis=1, tiled=True)

    values_bK, position_bK = top_k(by_tokens(values_BC), k)
    indices_bK = jnp.take_along_axis(by_tokens(indices_BC), position_bK, axis=1)

    def everywhere(x_bK):
        return lax.all_gather(x_bK, LATENT, axis=0, tiled=True)

    return everywhere(values_bK), everywhere(indices_bK)
