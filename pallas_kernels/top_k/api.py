"""Row-wise top-k, exact, ties to the lowest index."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.top_k import reference, xla

_IMPLEMENTATIONS = {"reference": reference.top_k, "xla": xla.top_k}


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
      are ordered by ascending index. NaN counts as larger than every number, so it surfaces.

    Raises:
      ValueError: k is out of range.
    """
    if not 1 <= k <= x_BL.shape[-1]:
        raise ValueError(f"top_k: k = {k} must lie in [1, {x_BL.shape[-1]}], the row length")
    return dispatch.choose("top_k", implementation, _IMPLEMENTATIONS)(x_BL, k)
