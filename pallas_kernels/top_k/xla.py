"""Exact row-wise top-k in two stages, for CPU and as the fallback everywhere.

Every element of the top k lies in one of the k groups with the largest group maximum. So: take
the maxima of small contiguous groups, pick k groups, and search only their members. Sorting the
chosen groups by position keeps candidates in index order, hence ties still fall to the lowest
index, exactly as `lax.top_k` resolves them. The first stage reads the row once; the second looks
at k * group candidates instead of the whole row.

`lax.top_k` takes NaN of one sign for the smallest number, and 0 for larger than -0. Elsewhere one
pass makes them one NaN and one zero; where that pass would cost as much as the selection, a
cheaper one finds out whether it is needed. On CPUs, which compare them so, numbers too small to be
normal count as 0.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch

# Members of a group, and groups needed per kept latent; with fewer, the second stage costs more
# than the first one saves (measured on CPU). A TPU selects from whole rows faster.
_GROUP = 8
_GROUPS_PER_KEPT = 16
# A CPU selects on one core, but in so many pieces, if they are worth it, on all.
_PIECES, _LEAST_ROWS = 16, 128


def top_k(x_BL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.top_k.api.top_k`."""
    if dispatch.current_target().platform == "cpu" and not in_two_stages(x_BL.shape[-1], k):
        return _whole_rows(x_BL, k)
    return top_k_of_ordered(ordered(x_BL), k)


@jax.custom_jvp
def ordered(x: jax.Array) -> jax.Array:
    """`x` with one NaN and one zero, as arithmetic makes two of each."""
    return jnp.where(jnp.isnan(x), jnp.nan, jnp.where(x == 0, 0.0, x)).astype(x.dtype)


@ordered.defjvp
def _ordered_jvp(primals, tangents):
    # The identity: which zero or NaN it is changes nothing.
    return ordered(*primals), tangents[0]


def top_k_of_ordered(x_BL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`top_k` of what `ordered` returned: who makes x in a pass of his own can order it there."""
    n = x_BL.shape[-1]
    if not in_two_stages(n, k):
        return _lax_top_k(x_BL, k)
    groups_BGM = x_BL.reshape(*x_BL.shape[:-1], n // _GROUP, _GROUP)
    maxima_BK, chosen_BK = _lax_top_k(_group_max(groups_BGM), k)
    chosen_BK = jnp.sort(chosen_BK, axis=-1)
    members_BKM = jnp.take_along_axis(groups_BGM, chosen_BK[..., None], axis=-2)
    values_BK, flat_BK = _lax_top_k(members_BKM.reshape(*x_BL.shape[:-1], k * _GROUP), k)
    group_BK = jnp.take_along_axis(chosen_BK, flat_BK // _GROUP, axis=-1)
    # Changes nothing, since k groups hold an element each that is no smaller. But were the maxima
    # not used, all pieces of the first selection would get one buffer for them, hence one core.
    # No maximum: where both are equal, its gradient would go to all of the group.
    least_B1 = maxima_BK[..., -1:]
    values_BK = jnp.where(values_BK < least_B1, least_B1, values_BK)
    return values_BK, group_BK * _GROUP + flat_BK % _GROUP


def in_two_stages(n: int, k: int, platform: str | None = None) -> bool:
    """Whether rows of n are searched by groups; otherwise a CPU may hold a second, ordered x.

    Args:
      n: row length.
      k: how many are kept.
      platform: None is that of the target in force.
    """
    on_tpu = dispatch.platform_of("in_two_stages", platform) == "tpu"
    return not on_tpu and n % _GROUP == 0 and n // _GROUP >= _GROUPS_PER_KEPT * k


def _whole_rows(x_BL: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    values_BK, indices_BK = _lax_top_k(x_BL, k)
    # A sum is NaN where an element is; zeros matter where one may be kept, or just not.
    sum_B = x_BL.sum(-1, dtype=jnp.promote_types(x_BL.dtype, jnp.float32))
    zeros_matter = (values_BK[..., -1] <= 0).any()
    other_zero = lax.cond(
        zeros_matter,
        lambda: _is_other_zero(x_BL).any(),
        lambda: jnp.zeros((), bool),
    )
    return lax.cond(
        jnp.isnan(sum_B).any() | other_zero,
        lambda: _lax_top_k(ordered(x_BL), k),
        lambda: (values_BK, indices_BK),
    )


def _is_other_zero(x: jax.Array) -> jax.Array:
    """Whether it is -0, or so small that a CPU compares it as zero; told by its bits alone."""
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, unsigned)
    magnitude = bits & (jnp.iinfo(unsigned).max >> 1)
    least_normal = lax.bitcast_convert_type(jnp.finfo(x.dtype).tiny, unsigned)
    return (bits != 0) & (magnitude < least_normal)


def _behind_barriers(arrays):
    """One for each: XLA on CPU aborts where a barrier takes the whole result of a top-k."""
    return [lax.optimization_barrier(array) for array in arrays]


def _lax_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k`.

    Behind a barrier: XLA takes a top-k of which a slice is used for a sort, which is slower by far.
    """
    on_cpu = dispatch.current_target().platform == "cpu"
    if on_cpu and x.ndim == 2 and len(x) >= _LEAST_ROWS:
        cuts = [len(x) * i // _PIECES for i in range(1, _PIECES)]
        pieces = [_behind_barriers(lax.top_k(rows, k)) for rows in jnp.split(x, cuts)]
        values, indices = (jnp.concatenate(part) for part in zip(*pieces, strict=True))
    else:
        values, indices = _behind_barriers(lax.top_k(x, k))
    return values, indices.astype(jnp.int32)


def _group_max(groups_BGM: jax.Array) -> jax.Array:
    # By halving, since XLA's max reduction on CPU drops NaN; elementwise maximum does not.
    while (size := groups_BGM.shape[-1]) > 1:
        groups_BGM = jnp.maximum(groups_BGM[..., : size // 2], groups_BGM[..., size // 2 :])
    return groups_BGM[..., 0]
