"""Row-wise top-k as a mask, exact, ties to the lowest index."""

import jax

from pallas_kernels import checks, dispatch

AVAILABLE = ("xla", "reference")


def top_k_mask(x_BL: jax.Array, k: int, *, implementation: str | None = None) -> jax.Array:
    """Which entries are among the k largest of their row.

    For large k: its cost does not depend on k, no list of indices is made and nothing is sorted.

    Args:
      x_BL: `[B, L]`, floating point.
      k: 1 <= k <= L.
      implementation: "xla", "reference", or None.

    Returns:
      `[B, L]` bool, k of them True in every row: those that `top_k` selects.

    Raises:
      ValueError, TypeError: the shape, the size or the dtype of x, or k.
    """
    checks.array("top_k_mask", "x_BL", x_BL, (None, None))
    checks.kept("top_k_mask", "k", k, x_BL.shape[-1])
    return dispatch.call("top_k_mask", implementation, AVAILABLE, x_BL, k)
