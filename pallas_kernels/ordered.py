"""Sums over the runs of a sorted list, in an order that does not depend on timing.

XLA on a GPU carries out a scatter-add with atomic additions, in whatever order they come. Here what
goes to one place is summed first, by a scan of log2 P rounds over all of the list, and only the
last of each run is added: no two additions meet. Elsewhere XLA's scatter-add has one order.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def needed() -> bool:
    """Whether scatter-adds are carried out in any order where this program is meant to run."""
    return dispatch.current_target().platform == "gpu"


def add_runs(total_N: jax.Array, parts_P: jax.Array, places_P: jax.Array) -> jax.Array:
    """`total.at[places].add(parts)` for ascending places; those of N and above are dropped.

    Args:
      total_N: `[N]` or `[N, D]`.
      parts_P: `[P]` or `[P, D]`, in the dtype of the total.
      places_P: `[P]` int32, ascending.
    """
    if not needed():
        return total_N.at[places_P].add(parts_P, mode="drop", indices_are_sorted=True)
    length, shape = len(places_P), (-1, *(1,) * (parts_P.ndim - 1))
    distance = 1
    while distance < length:
        # Places ascend: where both ends of a distance are one place, so is all between them.
        same = (places_P[distance:] == places_P[:-distance]).reshape(shape)
        ahead = jnp.where(same, parts_P[:-distance], 0)
        parts_P = jnp.concatenate([parts_P[:distance], parts_P[distance:] + ahead])
        distance *= 2
    is_last = jnp.concatenate([places_P[1:] != places_P[:-1], jnp.ones(1, bool)])[:length]
    beyond = len(total_N) + jnp.arange(length, dtype=places_P.dtype)
    places_P = jnp.where(is_last & (places_P < len(total_N)), places_P, beyond)
    return total_N.at[places_P].add(parts_P, mode="drop", unique_indices=True)
