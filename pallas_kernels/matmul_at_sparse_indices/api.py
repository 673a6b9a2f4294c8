"""Product at chosen entries, without a gradient rule."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.matmul_at_sparse_indices import reference, xla

_IMPLEMENTATIONS = {
    "reference": reference.matmul_at_sparse_indices,
    "xla": xla.matmul_at_sparse_indices,
}


def compute(
    a_BD: jax.Array, w_LD: jax.Array, indices_BK: jax.Array, implementation: str | None
) -> jax.Array:
    """`out[b, j] = <a[b], w[indices[b, j]]>`; see `vjp.matmul_at_sparse_indices`."""
    fn = dispatch.choose("matmul_at_sparse_indices", implementation, _IMPLEMENTATIONS)
    return fn(a_BD, w_LD, indices_BK)
