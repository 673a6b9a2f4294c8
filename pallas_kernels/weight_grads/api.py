"""Gradients of both weight matrices and of the latent bias, from a sparse code."""

from typing import NamedTuple

import jax

from pallas_kernels import checks, dispatch
from pallas_kernels.pair_list.pairs import Pairs

AVAILABLE = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")


class WeightGrads(NamedTuple):
    """Gradients, float32 or wider.

    Attributes:
      w_dec_LD, w_enc_LD: `[L, D]`.
      latent_bias_L: `[L]`.
    """

    w_dec_LD: jax.Array
    w_enc_LD: jax.Array
    latent_bias_L: jax.Array


def weight_grads(
    values_BK: jax.Array,
    d_values_BK: jax.Array,
    indices_BK: jax.Array,
    e_BD: jax.Array,
    x_BD: jax.Array,
    n: int,
    *,
    totals: WeightGrads | None = None,
    implementation: str | None = None,
) -> WeightGrads:
    """Sums `values * e[token]`, `d_values * x[token]` and `d_values` over each latent's pairs.

    The pairs of a latent are added in an order that does not depend on timing (by the reference on
    a GPU it may). Not differentiable: it is a gradient already.
    `sparse_transpose_matmul` is one of its sums.

    Args:
      values_BK: `[B, K]` coefficients of the decoder's gradient.
      d_values_BK: `[B, K]` coefficients of the encoder's.
      indices_BK: `[B, K]` int32 in [0, n).
      e_BD: `[B, D]` what the decoder's rows collect.
      x_BD: `[B, D]` what the encoder's rows collect.
      n: latents.
      totals: sums to add to, float32 or float64, which the result is too; None is zeros.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", "reference", or None.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype.
      NotImplementedError: the named implementation cannot run here.
    """
    op = "weight_grads"
    checks.code(op, values_BK, indices_BK, ("values_BK", "indices_BK"))
    checks.array(op, "d_values_BK", d_values_BK, values_BK.shape)
    _check(op, values_BK.shape[0], e_BD, x_BD, n, totals)
    arrays = (values_BK, d_values_BK, indices_BK, e_BD, x_BD, n)
    return WeightGrads(*dispatch.call(op, implementation, AVAILABLE, *arrays, totals=totals))


def weight_grads_of_pairs(
    pairs: Pairs,
    d_values_P: jax.Array,
    e_BD: jax.Array,
    x_BD: jax.Array,
    n: int,
    *,
    totals: WeightGrads | None = None,
    implementation: str | None = None,
) -> WeightGrads:
    """`weight_grads` of a code that is one list of pairs, see `pair_list`.

    Args:
      pairs: sorted by (latent, token); their values are the decoder's coefficients.
      d_values_P: `[P]` coefficients of the encoder's gradient; ignored where unused.
      e_BD, x_BD, n, totals, implementation: see `weight_grads`.
    """
    op = "weight_grads.weight_grads_of_pairs"
    checks.pairs(op, pairs)
    checks.array(op, "d_values_P", d_values_P, pairs.values_P.shape)
    _check(op, None, e_BD, x_BD, n, totals)
    arrays = (pairs, d_values_P, e_BD, x_BD, n)
    return WeightGrads(*dispatch.call(op, implementation, AVAILABLE, *arrays, totals=totals))


def _check(op: str, tokens: int | None, e_BD, x_BD, n: int, totals: WeightGrads | None):
    checks.whole(op, "n", n)
    checks.array(op, "e_BD", e_BD, (tokens, None))
    checks.array(op, "x_BD", x_BD, e_BD.shape)
    checks.result(op, n, e_BD.shape[1])
    if totals is not None:
        checks.instance(op, "totals", totals, WeightGrads)
        for name in ("w_dec_LD", "w_enc_LD"):
            checks.array(op, f"totals.{name}", getattr(totals, name), (n, e_BD.shape[1]), "wide")
        checks.array(op, "totals.latent_bias_L", totals.latent_bias_L, (n,), "wide")
