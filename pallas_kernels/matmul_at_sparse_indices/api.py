"""Product at chosen entries, without a gradient rule."""

import jax

from pallas_kernels import checks, dispatch

AVAILABLE = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")


def compute(
    a_BD: jax.Array, w_LD: jax.Array, indices_BK: jax.Array, implementation: str | None
) -> jax.Array:
    """`out[b, j] = <a[b], w[indices[b, j]]>`; see `vjp.matmul_at_sparse_indices`."""
    op = "matmul_at_sparse_indices"
    checks.array(op, "a_BD", a_BD, (None, None))
    checks.array(op, "w_LD", w_LD, (None, a_BD.shape[1]))
    checks.array(op, "indices_BK", indices_BK, (a_BD.shape[0], None), "int32")
    return dispatch.call(op, implementation, AVAILABLE, a_BD, w_LD, indices_BK)
