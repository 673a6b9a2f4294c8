"""Weight gradients and the optimizer's work on them as one operation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import checks, dispatch
from pallas_kernels.row_update.api import (
    RowScalars,
    RowSettings,
    RowUpdated,
    check_average,
    dtype_of_copy,
    in_dtype,
)

AVAILABLE = ("mosaic_gpu", "xla", "reference")


class Rows(NamedTuple):
    """A weight matrix and its optimizer state, each `[L, D]`; see `row_update`."""

    w_LD: jax.Array
    mu_LD: jax.Array
    nu_LD: jax.Array
    ema_LD: jax.Array | None


class Updated(NamedTuple):
    """Both matrices after the update, and the gradient of the latent bias `[L]`."""

    dec: RowUpdated
    enc: RowUpdated
    latent_bias_L: jax.Array


def weight_grads_update(
    values_BK: jax.Array,
    d_values_BK: jax.Array,
    indices_BK: jax.Array,
    e_BD: jax.Array,
    x_BD: jax.Array,
    dec: Rows,
    enc: Rows,
    scalars: RowScalars,
    *,
    dec_settings: RowSettings,
    enc_settings: RowSettings,
    copy_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> Updated:
    """`weight_grads`, then `row_update` of each matrix; kernels keep the gradient on the chip.

    Legal where the gradient is complete when its row is: one device or latents alone sharded, one
    block of tokens, no clipping by the global norm.

    Args:
      values_BK, d_values_BK, indices_BK, e_BD, x_BD: see `weight_grads`.
      dec, enc: decoder and encoder, both float32 or both float64.
      scalars, copy_dtype: see `row_update`.
      dec_settings, enc_settings: see `RowSettings`.
      implementation: "mosaic_gpu", "xla", "reference", or None.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype.
      NotImplementedError: the named implementation cannot run here.
    """
    op = "weight_grads_update"
    checks.code(op, values_BK, indices_BK, ("values_BK", "indices_BK"))
    checks.array(op, "d_values_BK", d_values_BK, values_BK.shape)
    checks.array(op, "e_BD", e_BD, (values_BK.shape[0], None))
    checks.array(op, "x_BD", x_BD, e_BD.shape)
    for name, rows in {"dec": dec, "enc": enc}.items():
        checks.instance(op, name, rows, Rows)
    for name, settings in {"dec_settings": dec_settings, "enc_settings": enc_settings}.items():
        checks.instance(op, name, settings, RowSettings)
    checks.array(op, "dec.w_LD", dec.w_LD, (None, e_BD.shape[1]), "wide")
    for name, rows, settings in (("dec", dec, dec_settings), ("enc", enc, enc_settings)):
        check_average(op, f"{name}.ema_LD", rows.ema_LD, settings)
        state = {f"{name}.{field}": array for field, array in rows._asdict().items()}
        checks.state(op, state, dec.w_LD)
    scalars = in_dtype(op, scalars, dec.w_LD.dtype)
    pairs = (values_BK, d_values_BK, indices_BK, e_BD, x_BD)
    settled = {
        "dec_settings": dec_settings,
        "enc_settings": enc_settings,
        "copy_dtype": dtype_of_copy(op, copy_dtype),
    }
    done = dispatch.call(op, implementation, AVAILABLE, *pairs, dec, enc, scalars, **settled)
    return Updated(RowUpdated(*done[0]), RowUpdated(*done[1]), done[2])
