"""What the kernels for TPUs share: rows as 32-bit words, limits of the chips, refusals.

A TPU keeps a matrix in tiles of 8 rows. A single row of 32-bit words can be copied out of them, one
of bfloat16 cannot: two rows share every word, one in each half. Hence rows that a kernel gathers
hold 32-bit words: float32 as it is, without a copy, and bfloat16 with the columns c and c + D / 2
of one row in one word, which XLA writes in the pass that rounds or copies the matrix.
(As `[L, 1, D]` each bfloat16 row would be padded to twice its size, and float32 would be copied.)
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dispatch import Target

LANES = 128
SUBLANES = 8
VMEM_LIMIT = 48 * 2**20  # of a kernel; the smallest vector memory below is 64 MiB
_OLD = ("v2", "v3", "v4")  # 16 MiB of vector memory


def refusal(target: Target, **arrays: jax.Array) -> str | None:
    """Why no kernel can take these arrays; None if nothing is known against it.

    Args:
      target: what the call is traced for.
      **arrays: by name; of the matrices `[*, D]` only names that end in D.
    """
    if any(old in target.device_kind for old in _OLD):
        return f"it needs the vector memory of v5e, v5p, v6e or later, not of {target.device_kind}"
    for name, array in arrays.items():
        if 0 in array.shape:
            return f"{name} of shape {list(array.shape)} is empty"
        if array.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {array.dtype}, and kernels compute in float32"
        if name.endswith("D") and array.shape[-1] % LANES:
            return f"d = {array.shape[-1]}, the width of {name}, is not a multiple of {LANES}"
    return None


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not smaller than `size`."""
    return -(-size // multiple) * multiple


def divisor(size: int, most: int) -> int:
    """The largest multiple of 128 that divides `size` and is at most `most`, or the least above.

    128 itself only if that is the size: see `spans`.
    """
    divisors = [c for c in range(size, 0, -LANES) if size % c == 0 and c >= min(size, 2 * LANES)]
    return next((c for c in divisors if c <= most), divisors[-1])


def spans(size: int, most: int) -> list[tuple[int, int]]:
    """Cuts `size`, a multiple of 128, into (start, length) of at most `most` lanes.

    No part has 128 lanes unless it is the whole: the compiler refuses to load so narrow a part of
    a row whose number it does not know.
    """
    cuts = [*range(0, size, most), size]
    if len(cuts) > 2 and size - cuts[-2] == LANES:
        cuts[-2] -= LANES
    return [(start, end - start) for start, end in zip(cuts, cuts[1:])]


def row_words(w_LD: jax.Array) -> jax.Array:
    """Rows as words: `[L, D]` float32, or `[L, D / 2]` uint32 of bfloat16 pairs; see above.

    bfloat16 becomes float32 where the words would fill only half a register, or be of 128 lanes.
    """
    width = w_LD.shape[1]
    if w_LD.dtype != jnp.bfloat16 or width % (2 * LANES) or width == 2 * LANES:
        return w_LD.astype(jnp.float32)
    return pair_words(w_LD[:, : width // 2], w_LD[:, width // 2 :])


def pair_words(low: jax.Array, high: jax.Array) -> jax.Array:
    """Two bfloat16 arrays in the halves of uint32 words."""
    low, high = (lax.bitcast_convert_type(a, jnp.uint16).astype(jnp.uint32) for a in (low, high))
    return low | (high << 16)


def halves(words: jax.Array) -> tuple[jax.Array, ...]:
    """The float32 arrays in the words: two of uint32 words, else the array itself."""
    if words.dtype != jnp.uint32:
        return (words,)
    low, high = words << 16, words & jnp.uint32(0xFFFF0000)
    return tuple(lax.bitcast_convert_type(half, jnp.float32) for half in (low, high))
