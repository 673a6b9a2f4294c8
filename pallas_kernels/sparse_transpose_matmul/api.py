"""Transposed sparse decode: the weight gradients of encoder and decoder."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.sparse_transpose_matmul import reference, xla

_IMPLEMENTATIONS = {
    "reference": reference.sparse_transpose_matmul,
    "xla": xla.sparse_transpose_matmul,
}


def sparse_transpose_matmul(
    values_BK: jax.Array,
    indices_BK: jax.Array,
    a_BD: jax.Array,
    n: int,
    *,
    total_LD: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`out[l] = sum over (b, j) with indices[b, j] = l of values[b, j] * a[b]`.

    Args:
      values_BK: `[B, K]` floating point.
      indices_BK: `[B, K]` integers in [0, n).
      a_BD: `[B, D]`.
      n: number of output rows (latents).
      total_LD: `[n, D]` to add to; None is zeros.
      implementation: "xla", "reference", or None.

    Returns:
      `[n, D]` in the dtype of `total_LD`, or else the promoted one.
    """
    fn = dispatch.choose("sparse_transpose_matmul", implementation, _IMPLEMENTATIONS)
    return fn(values_BK, indices_BK, a_BD, n, total_LD)
