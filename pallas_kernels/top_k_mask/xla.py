"""The mask of the top k by bisection of the k-th largest value, bit by bit.

Floating-point numbers, read as integers of their bits, are ordered as they are (negative ones the
other way round, which is undone). So the largest integer that at least k entries reach is found in
as many counting passes as a number has bits, and is the k-th largest entry itself.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.top_k.xla import ordered

_INTEGERS = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


def top_k_mask(x_BL: jax.Array, k: int) -> jax.Array:
    """See `pallas_kernels.top_k_mask.api.top_k_mask`."""
    bits_BL = _ordered_bits(x_BL)
    kth_B1 = _kth_largest(bits_BL, k)[:, None]
    reached_BL = bits_BL >= kth_B1
    tied = (reached_BL.sum(-1) > k).any()

    def lowest_of_tied():
        above_BL = bits_BL > kth_B1
        equal_BL = bits_BL == kth_B1
        left_B1 = k - above_BL.sum(-1, keepdims=True)
        return above_BL | (equal_BL & (jnp.cumsum(equal_BL, axis=-1) <= left_B1))

    return lax.cond(tied, lowest_of_tied, lambda: reached_BL)


def _ordered_bits(x_BL: jax.Array) -> jax.Array:
    integer = _INTEGERS[x_BL.dtype.itemsize]
    bits_BL = lax.bitcast_convert_type(ordered(x_BL), integer)
    return jnp.where(bits_BL < 0, bits_BL ^ jnp.iinfo(integer).max, bits_BL)


def _kth_largest(bits_BL: jax.Array, k: int) -> jax.Array:
    """`[B]`: the largest integer that at least k entries of a row reach."""
    limits = jnp.iinfo(bits_BL.dtype)

    def reached(bound_B):
        return (bits_BL >= bound_B[:, None]).sum(-1, dtype=jnp.int32) >= k

    def refine(i, bound_B):
        higher_B = bound_B + (jnp.ones((), bits_BL.dtype) << (limits.bits - 2 - i))
        return jnp.where(reached(higher_B), higher_B, bound_B)

    zero_B = jnp.zeros(len(bits_BL), bits_BL.dtype)
    bound_B = jnp.where(reached(zero_B), zero_B, limits.min)
    return lax.fori_loop(0, limits.bits - 1, refine, bound_B)
