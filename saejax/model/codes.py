"""A sparse code of a block of tokens, in the layout that suits its size; the gradients it needs.

Three layouts with the same methods, for the latents of one shard:

    RowCode    k slots for every token: all latents on one device
    PairCode   one list of (token, latent) pairs: latents split, so that few slots are kept
    DenseCode  a value for every latent: few latents, each kept often (AuxK's dead ones)

A dense code multiplies values rounded to the compute dtype, the others unrounded ones. `values` are
after ReLU. `slopes` masks where a value passes its gradient on: the gradient of the
selection itself is zero (Gao et al. 2024, App. D).
"""

import dataclasses

import jax
import jax.numpy as jnp

from saejax.model import sparse
from saejax.model.sparse import pair_list

_DENSE_BELOW = {"cpu": 24}
_DENSE_BELOW_ELSEWHERE = 184


def dense_below(platform: str) -> int:
    """Latents per kept latent below which a dense code is cheaper than a sparse one.

    A matrix unit multiplies with this many rows while memory delivers one (a CPU, with fewer).
    """
    return _DENSE_BELOW.get(platform, _DENSE_BELOW_ELSEWHERE)


def layout(k: int, n_latents: int, shards: int, dense_below: int) -> type:
    """The layout of a code of k latents per token over `shards` shards of `n_latents` each."""
    if n_latents * shards <= dense_below * k:
        return DenseCode
    return PairCode if shards > 1 else RowCode


def gathered_arrays(
    k: int, capacity: int, n_latents: int, shards: int, dense_below: int
) -> tuple[int, int]:
    """Arrays of a code that its weight gradients need, derivatives included; bytes per token."""
    kind = layout(k, n_latents, shards, dense_below)
    if kind is DenseCode:  # values, derivatives
        return 2, 2 * 4 * n_latents
    if kind is RowCode:  # and latents
        return 3, 3 * 4 * min(k, n_latents)
    return 4, 4 * 4 * min(capacity, n_latents)  # and tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCode:
    """`[B, K]` values and indices; nothing is kept where `slopes` is False."""

    values: jax.Array
    indices: jax.Array
    slopes: jax.Array

    def decode(self, w_LD: jax.Array) -> jax.Array:
        """`[B, D]`: the sum of the kept rows of `w_LD`, each times its value."""
        return sparse.dense_sparse_matmul(self.values, self.indices, w_LD)

    def value_gradients(self, e_BD: jax.Array, w_LD: jax.Array) -> jax.Array:
        """`<e, w[latent]>` where a gradient passes, shaped as `values`."""
        e_BD = e_BD.astype(self.values.dtype)
        inner = sparse.matmul_at_sparse_indices(e_BD, w_LD, self.indices)
        return jnp.where(self.slopes, inner, 0)

    def add_outer(self, total_LD: jax.Array, coefficients: jax.Array, a_BD: jax.Array):
        """`total_LD` plus `coefficient * a[token]` at the row of every kept latent."""
        return sparse.sparse_transpose_matmul(
            coefficients, self.indices, a_BD, len(total_LD), total_LD=total_LD
        )

    def add_to_latents(self, total_L: jax.Array, coefficients: jax.Array) -> jax.Array:
        """`total_L` plus the coefficients of every latent."""
        return total_L.at[self.indices.reshape(-1)].add(coefficients.reshape(-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairCode:
    """A list of pairs, as `pallas_kernels.pair_list` has them; `slopes` `[P]`."""

    pairs: pair_list.Pairs
    slopes: jax.Array
    n_tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def values(self) -> jax.Array:
        """`[P]`."""
        return self.pairs.values_P

    def decode(self, w_LD: jax.Array) -> jax.Array:
        """See `RowCode.decode`."""
        return pair_list.decode(self.pairs, w_LD, self.n_tokens)

    def value_gradients(self, e_BD: jax.Array, w_LD: jax.Array) -> jax.Array:
        """See `RowCode.value_gradients`."""
        return jnp.where(self.slopes, pair_list.dot(self.pairs, e_BD, w_LD), 0)

    def add_outer(self, total_LD: jax.Array, coefficients: jax.Array, a_BD: jax.Array):
        """See `RowCode.add_outer`."""
        pairs = self.pairs._replace(values_P=coefficients)
        return pair_list.add_outer(total_LD, pairs, a_BD)

    def add_to_latents(self, total_L: jax.Array, coefficients: jax.Array) -> jax.Array:
        """See `RowCode.add_to_latents`."""
        return total_L.at[self.pairs.latents_P].add(
            coefficients, mode="drop", indices_are_sorted=True
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCode:
    """`[B, L]` values, 0 where not kept."""

    values: jax.Array
    slopes: jax.Array

    def decode(self, w_LD: jax.Array) -> jax.Array:
        """See `RowCode.decode`."""
        return sparse.matmul(self.values.astype(w_LD.dtype), w_LD)

    def value_gradients(self, e_BD: jax.Array, w_LD: jax.Array) -> jax.Array:
        """See `RowCode.value_gradients`."""
        return jnp.where(self.slopes, sparse.matmul(e_BD, w_LD.T), 0)

    def add_outer(self, total_LD: jax.Array, coefficients: jax.Array, a_BD: jax.Array):
        """See `RowCode.add_outer`."""
        return total_LD + sparse.matmul(coefficients.astype(a_BD.dtype).T, a_BD)

    def add_to_latents(self, total_L: jax.Array, coefficients: jax.Array) -> jax.Array:
        """See `RowCode.add_to_latents`."""
        return total_L + coefficients.sum(0)


Code = RowCode | PairCode | DenseCode


def make_code(
    values_BC: jax.Array,
    indices_BC: jax.Array,
    count_B: jax.Array,
    n_latents: int,
    *,
    shards: int,
    k: int,
    relu: bool,
    dense_below: int,
) -> Code:
    """The code of the first `count_B` candidates of every token, in the layout that suits it.

    Args:
      values_BC: `[B, C]` pre-activations of the candidates; -inf is never kept.
      indices_BC: `[B, C]` their latents, in [0, n_latents).
      count_B: how many of them are kept.
      n_latents: L, of this shard.
      shards: latent shards.
      k: latents kept per token over all shards.
      relu: apply ReLU, so that what is not positive is off.
      dense_below: see the function of this name.
    """
    kept_BC = (jnp.arange(values_BC.shape[1]) < count_B[:, None]) & (values_BC != -jnp.inf)
    values_BC = jnp.where(kept_BC, values_BC, 0)
    if relu:
        # Not `values > 0`: NaN stays, and surfaces in the loss.
        kept_BC &= ~(values_BC <= 0)
        values_BC = jnp.where(kept_BC, values_BC, 0)
    kind = layout(k, n_latents, shards, dense_below)
    if kind is PairCode:
        pairs = pair_list.compact(kept_BC, values_BC, indices_BC, n_latents)
        return PairCode(pairs, pairs.latents_P < n_latents, len(values_BC))
    if kind is RowCode:
        return RowCode(values_BC, indices_BC, kept_BC)
    rows_B1 = jnp.arange(len(values_BC))[:, None]
    shape = (len(values_BC), n_latents)
    return DenseCode(
        jnp.zeros(shape, values_BC.dtype).at[rows_B1, indices_BC].set(values_BC),
        jnp.zeros(shape, bool).at[rows_B1, indices_BC].set(kept_BC),
    )
