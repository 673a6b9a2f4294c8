"""Exact row-wise top-k in two stages, for CPU and as the fallback everywhere.

Every element of the top k lies in one of the k groups with the largest group maximum. So: take
the maxima of small contiguous groups, pick k groups, and search only their members. Sorting the
chosen groups by position keeps candidates in index order, hence ties still fall to the lowest
index, exactly as `lax.top_k` resolves them. The first stage reads the row once; the second looks
at k * group candidates instead of the whole row.
"""

import jax
import jax.numpy as jnp
from jax import lax

# (group size, groups needed per kept latent), preferred first; measured on CPU. With fewer groups
# the second stage costs more than the first one saves.
_GROUPINGS = ((16, 32), (8, 4))


def top_k(x_BL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.api.top_k`."""
    n = x_BL.shape[-1]
    size = next((g for g, per_k in _GROUPINGS if n % g == 0 and n // g >= per_k * k), None)
    if size is None:
        return _one_stage(x_BL, k)
    groups_BGM = x_BL.reshape(*x_BL.shape[:-1], n // size, size)
    _, chosen_BK = _one_stage(_group_max(groups_BGM), k)
    chosen_BK = jnp.sort(chosen_BK, axis=-1)
    members_BKM = jnp.take_along_axis(groups_BGM, chosen_BK[..., None], axis=-2)
    values_BK, flat_BK = _one_stage(members_BKM.reshape(*x_BL.shape[:-1], k * size), k)
    group_BK = jnp.take_along_axis(chosen_BK, flat_BK // size, axis=-1)
    return values_BK, group_BK * size + flat_BK % size


def _one_stage(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    # One NaN and one zero: `lax.top_k` sorts -NaN last and -0 after 0; arithmetic makes both.
    ordered = jnp.where(jnp.isnan(x), jnp.nan, jnp.where(x == 0, 0.0, x))
    values, indices = lax.top_k(ordered, k)
    return values, indices.astype(jnp.int32)


def _group_max(groups_BGM: jax.Array) -> jax.Array:
    # By halving, since XLA's max reduction on CPU drops NaN; elementwise maximum does not.
    while (size := groups_BGM.shape[-1]) > 1:
        groups_BGM = jnp.maximum(groups_BGM[..., : size // 2], groups_BGM[..., size // 2 :])
    return groups_BGM[..., 0]
