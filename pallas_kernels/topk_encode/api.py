"""Encoder and exact top-k as one operation."""

from typing import NamedTuple

import jax

from pallas_kernels import checks, dispatch

AVAILABLE = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")


class Encoded(NamedTuple):
    """The k largest pre-activations of every token.

    Attributes:
      values_BK: `[B, k]` float32 or wider, descending.
      indices_BK: `[B, k]` int32.
      fallback_tokens: int32 scalar, tokens that a kernel's first pass did not settle and that were
        selected again from all their pre-activations; the result is exact either way.
    """

    values_BK: jax.Array
    indices_BK: jax.Array
    fallback_tokens: jax.Array


def compute(
    x_BD: jax.Array, w_LD: jax.Array, b_L: jax.Array, k: int, implementation: str | None
) -> Encoded:
    """See `pallas_kernels.topk_encode.vjp.topk_encode`."""
    op = "topk_encode"
    checks.array(op, "x_BD", x_BD, (None, None))
    checks.array(op, "w_LD", w_LD, (None, x_BD.shape[1]))
    checks.array(op, "b_L", b_L, (w_LD.shape[0],))
    checks.kept(op, "k", k, w_LD.shape[0])
    checks.entries(op, f"the result of {x_BD.shape[0]} tokens and k = {k}", x_BD.shape[0] * int(k))
    return Encoded(*dispatch.call(op, implementation, AVAILABLE, x_BD, w_LD, b_L, k))
