"""Exact row-wise top-k in two stages, for CPU and as the fallback everywhere.

Every element of the top k lies in one of the k groups with the largest group maximum. So: take
the maxima of contiguous groups of `_GROUP`, pick k groups, and search only their members. Sorting
the chosen groups by position keeps candidates in index order, hence ties still fall to the lowest
index, exactly as `lax.top_k` resolves them. The first stage reads the row once; the second looks
at k * _GROUP candidates instead of the whole row.
"""

import jax
import jax.numpy as jnp
from jax import lax

_GROUP = 16
# Below this many groups per kept latent the second stage costs as much as it saves.
_MIN_GROUPS_PER_K = 4


def _ordered(x: jax.Array) -> jax.Array:
    """One NaN and one zero: `lax.top_k` sorts -NaN last and -0 after 0; arithmetic makes both."""
    return jnp.where(jnp.isnan(x), jnp.nan, jnp.where(x == 0, 0.0, x))


def top_k(x_BL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.api.top_k`."""
    n = x_BL.shape[-1]
    if n % _GROUP or n // _GROUP < _MIN_GROUPS_PER_K * k:
        values, indices = lax.top_k(_ordered(x_BL), k)
        return values, indices.astype(jnp.int32)
    groups_BGM = x_BL.reshape(*x_BL.shape[:-1], n // _GROUP, _GROUP)
    # XLA's max reduction on CPU drops NaN: let it stand as infinity there (fused, no extra pass).
    peaks_BG = jnp.where(jnp.isnan(groups_BGM), jnp.inf, groups_BGM).max(-1)
    _, chosen_BK = lax.top_k(_ordered(peaks_BG), k)
    chosen_BK = jnp.sort(chosen_BK, axis=-1)
    members_BKM = jnp.take_along_axis(groups_BGM, chosen_BK[..., None], axis=-2)
    values_BK, flat_BK = lax.top_k(_ordered(members_BKM).reshape(*x_BL.shape[:-1], k * _GROUP), k)
    group_BK = jnp.take_along_axis(chosen_BK, flat_BK // _GROUP, axis=-1)
    return values_BK, (group_BK * _GROUP + flat_BK % _GROUP).astype(jnp.int32)
