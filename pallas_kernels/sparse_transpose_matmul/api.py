"""Transposed sparse decode: the weight gradients of encoder and decoder."""

import jax

from pallas_kernels import checks, dispatch

AVAILABLE = ("xla", "reference")


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

    By "xla" the pairs of a latent are added in an order that does not depend on timing.

    Args:
      values_BK: `[B, K]` floating point.
      indices_BK: `[B, K]` int32 in [0, n).
      a_BD: `[B, D]`.
      n: number of output rows (latents).
      total_LD: `[n, D]` to add to; None is zeros.
      implementation: "xla", "reference", or None.

    Returns:
      `[n, D]` in the dtype of `total_LD`, or else the promoted one.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype.
    """
    op = "sparse_transpose_matmul"
    checks.code(op, values_BK, indices_BK, ("values_BK", "indices_BK"))
    checks.whole(op, "n", n)
    checks.array(op, "a_BD", a_BD, (values_BK.shape[0], None))
    checks.result(op, n, a_BD.shape[1])
    checks.optional(op, "total_LD", total_LD, (n, a_BD.shape[1]))
    return dispatch.call(op, implementation, AVAILABLE, values_BK, indices_BK, a_BD, n, total_LD)
