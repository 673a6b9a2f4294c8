"""Row-wise top-k, exact, ties to the lowest index."""

import jax

from pallas_kernels import checks, dispatch

AVAILABLE = ("xla", "reference")


def top_k(
    x_BL: jax.Array, k: int, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of every row.

    Args:
      x_BL: `[..., L]`, floating point. Select in float32 or wider: rounding to bfloat16 makes the
        wrong pick in a third of the rows, and sorting bfloat16 is slow on every backend.
      k: 1 <= k <= L.
      implementation: "xla", "reference", or None.

    Returns:
      values `[..., k]` in the dtype of x, descending, and indices `[..., k]` int32. Equal values
      are ordered by ascending index. NaN counts as larger than every number, so it surfaces. On
      a CPU, whose arithmetic flushes them, numbers too small to be normal count as 0.

    Raises:
      ValueError, TypeError: the shape, the size or the dtype of x, or k.
    """
    checks.array("top_k", "x_BL", x_BL, (None,) * max(getattr(x_BL, "ndim", 1), 1))
    checks.kept("top_k", "k", k, x_BL.shape[-1])
    return dispatch.call("top_k", implementation, AVAILABLE, x_BL, k)
