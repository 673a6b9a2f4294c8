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
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saejax import collectives
from saejax.model import sparse
from saejax.model.sparse import WeightGrads, pair_list


def layout(k: int, n_latents: int, shards: int, dense_below: int) -> type:
    """The layout of a code of k latents per token over `shards` shards of `n_latents` each."""
    name = sparse.code_layout(k, n_latents * shards, shards, dense_below)
    return {"dense": DenseCode, "pairs": PairCode, "rows": RowCode}[name]


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


class Error(NamedTuple):
    """What the reconstruction of a target leaves, `e = target - reconstruction`.

    Attributes:
      own_bD: e of this device's own rows, in the compute dtype.
      all_BD: e of all tokens of the data row, in the compute dtype.
      squared: sum of e^2 over the own rows, before any rounding.
      inner: `<e, w[latent]>` where a gradient passes, else 0; shaped as the code's values.
    """

    own_bD: jax.Array
    all_BD: jax.Array
    squared: jax.Array
    inner: jax.Array


def _error_over_shards(target_bD: jax.Array, partial_BD: jax.Array, dtype: jnp.dtype):
    """`Error` but for its inner products, from this shard's part of the reconstruction."""
    e_bD = target_bD - collectives.sum_tokens(partial_BD)
    all_BD = collectives.gather_residual(e_bD, dtype)
    return e_bD.astype(dtype), all_BD, jnp.square(e_bD).sum()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCode:
    """`[B, K]` values and indices; nothing is kept where `slopes` is False."""

    values: jax.Array
    indices: jax.Array
    slopes: jax.Array

    def reconstruct(self, target_bD: jax.Array, w_LD: jax.Array, dtype: jnp.dtype) -> Error:
        """The error of the reconstruction; the latents are not split, so that it is local."""
        e_BD, inner_BK, squared_B = sparse.decode_loss(
            self.values, self.indices, w_LD, target_bD, residual_dtype=dtype
        )
        return Error(e_BD, e_BD, squared_B.sum(), jnp.where(self.slopes, inner_BK, 0))

    def add_weight_gradients(
        self,
        totals: WeightGrads,
        values: jax.Array,
        d_values: jax.Array,
        e_BD: jax.Array,
        x_BD: jax.Array,
    ) -> WeightGrads:
        """`totals` plus, at every kept latent's row, `values * e[token]` and `d_values * x[token]`.

        The coefficients are shaped as `self.values`.
        """
        rows = (self.indices, e_BD, x_BD, len(totals.w_dec_LD))
        return sparse.weight_grads(values, d_values, *rows, totals=totals)

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

    def reconstruct(self, target_bD: jax.Array, w_LD: jax.Array, dtype: jnp.dtype) -> Error:
        """The error of the reconstruction by all shards."""
        partial_BD = pair_list.decode(self.pairs, w_LD, self.n_tokens)
        own_bD, all_BD, squared = _error_over_shards(target_bD, partial_BD, dtype)
        inner_P = pair_list.dot(self.pairs, all_BD, w_LD)
        return Error(own_bD, all_BD, squared, jnp.where(self.slopes, inner_P, 0))

    def add_weight_gradients(self, totals, values, d_values, e_BD, x_BD) -> WeightGrads:
        """See `RowCode.add_weight_gradients`."""
        pairs = self.pairs._replace(values_P=values)
        rows = (e_BD, x_BD, len(totals.w_dec_LD))
        return sparse.weight_grads_of_pairs(pairs, d_values, *rows, totals=totals)

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

    def reconstruct(self, target_bD: jax.Array, w_LD: jax.Array, dtype: jnp.dtype) -> Error:
        """See `PairCode.reconstruct`."""
        partial_BD = sparse.matmul(self.values.astype(w_LD.dtype), w_LD)
        own_bD, all_BD, squared = _error_over_shards(target_bD, partial_BD, dtype)
        inner_BL = sparse.matmul(all_BD, w_LD.T)
        return Error(own_bD, all_BD, squared, jnp.where(self.slopes, inner_BL, 0))

    def add_weight_gradients(self, totals, values, d_values, e_BD, x_BD) -> WeightGrads:
        """See `RowCode.add_weight_gradients`."""
        return WeightGrads(
            totals.w_dec_LD + sparse.matmul(values.astype(e_BD.dtype).T, e_BD),
            totals.w_enc_LD + sparse.matmul(d_values.astype(x_BD.dtype).T, x_BD),
            totals.latent_bias_L + d_values.sum(0),
        )

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
      dense_below: see `sparse.dense_below`.
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
    where = (jnp.arange(len(values_BC))[:, None], indices_BC)
    shape = (len(values_BC), n_latents)
    return DenseCode(
        jnp.zeros(shape, values_BC.dtype).at[where].set(values_BC, unique_indices=True),
        jnp.zeros(shape, bool).at[where].set(kept_BC, unique_indices=True),
    )
