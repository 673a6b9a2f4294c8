"""The optimizer's work on a matrix whose rows are latents."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import checks, dispatch

AVAILABLE = ("mosaic_gpu", "mosaic_tpu", "xla", "reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSettings:
    """Static settings of `row_update`.

    Attributes:
      beta1, beta2, epsilon: Adam's.
      ema_decay: of the weights' running average; None keeps none.
      project: remove from every row's gradient its component along the row.
      unit_norm: scale every row to unit norm at the end; a zero row stays zero.
    """

    beta1: float
    beta2: float
    epsilon: float
    ema_decay: float | None = None
    project: bool = False
    unit_norm: bool = False


class RowScalars(NamedTuple):
    """What changes from step to step: arrays of shape (), or numbers.

    Attributes:
      learning_rate: float32.
      step: int32, 1 at the first update.
      scale: float32 factor of the gradient, for clipping.
      accept: bool; where it is False, everything stays as it was, bit for bit, whatever the
        gradient holds. None is True.
    """

    learning_rate: jax.Array
    step: jax.Array
    scale: jax.Array
    accept: jax.Array | None = None


class RowUpdated(NamedTuple):
    """The matrix and its optimizer state after the update.

    Attributes:
      w_LD, mu_LD, nu_LD: as they came.
      ema_LD: None without an average.
      copy_LD: `w_LD` in the compute dtype; None if none was asked for.
      squared_norm_L: of every row's gradient, projected but not scaled, accepted or not; float32
        or wider.
    """

    w_LD: jax.Array
    mu_LD: jax.Array
    nu_LD: jax.Array
    ema_LD: jax.Array | None
    copy_LD: jax.Array | None
    squared_norm_L: jax.Array


def row_update(
    w_LD: jax.Array,
    g_LD: jax.Array,
    mu_LD: jax.Array,
    nu_LD: jax.Array,
    ema_LD: jax.Array | None,
    scalars: RowScalars,
    *,
    settings: RowSettings,
    copy_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> RowUpdated:
    """Projection, Adam, unit norm, running average and low-precision copy, row by row, in one pass.

    With g the row's gradient, projected if wanted, t the step (Gao et al. 2024, App. A.4-A.6):

        g = g - <g, u> u,  u = w / |w|
        mu = beta1 mu + (1 - beta1) scale g
        nu = beta2 nu + (1 - beta2) (scale g)^2
        w = unit(w - learning_rate * (mu / (1 - beta1^t)) / (sqrt(nu / (1 - beta2^t)) + epsilon))
        ema = ema_decay ema + (1 - ema_decay) w

    Not differentiable.

    Args:
      w_LD, g_LD, mu_LD, nu_LD: `[L, D]` weights, gradient, Adam's moments.
      ema_LD: `[L, D]` running average; None exactly if `settings.ema_decay` is. It, the weights
        and the moments are of one dtype, float32 or float64.
      scalars: see `RowScalars`.
      settings: see `RowSettings`.
      copy_dtype: of the copy; None makes none.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", "reference", or None.

    Raises:
      ValueError, TypeError: an argument's shape, size or dtype.
      NotImplementedError: the named implementation cannot run here.
    """
    op = "row_update"
    checks.instance(op, "settings", settings, RowSettings)
    checks.array(op, "w_LD", w_LD, (None, None), "wide")
    checks.array(op, "g_LD", g_LD, w_LD.shape)
    check_average(op, "ema_LD", ema_LD, settings)
    checks.state(op, {"mu_LD": mu_LD, "nu_LD": nu_LD, "ema_LD": ema_LD}, w_LD)
    scalars = in_dtype(op, scalars, w_LD.dtype)
    arrays = (w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars)
    settled = {"settings": settings, "copy_dtype": dtype_of_copy(op, copy_dtype)}
    return RowUpdated(*dispatch.call(op, implementation, AVAILABLE, *arrays, **settled))


def check_average(op: str, name: str, ema_LD: jax.Array | None, settings: RowSettings):
    """Raises ValueError unless an average is given exactly if one is kept."""
    if (ema_LD is None) != (settings.ema_decay is None):
        raise ValueError(
            f"{op}: {name} is {'None' if ema_LD is None else 'given'}, but settings.ema_decay = "
            f"{settings.ema_decay}; give both or neither"
        )


def dtype_of_copy(op: str, copy_dtype: jnp.dtype | None) -> jnp.dtype | None:
    """Checks the dtype of the low-precision copy, if there is to be one."""
    return None if copy_dtype is None else checks.dtype(op, "copy_dtype", copy_dtype)


def in_dtype(op: str, scalars: RowScalars, dtype: jnp.dtype) -> RowScalars:
    """The scalars as arrays, such that none of them widens the matrix.

    Raises:
      ValueError: one has a shape.
      TypeError: they are no `RowScalars`, or one is no number.
    """
    checks.instance(op, "scalars", scalars, RowScalars)

    def narrow(name, scalar):
        if scalar is None or isinstance(scalar, str):
            raise TypeError(f"{op}: scalars.{name} = {scalar!r} must be a number, or array of one")
        scalar = scalar if hasattr(scalar, "dtype") else jnp.asarray(scalar)
        if scalar.shape:
            raise ValueError(
                f"{op}: scalars.{name} has shape {list(scalar.shape)}, but must have [], one for "
                f"all rows"
            )
        wider = scalar.dtype == jnp.float64 and dtype != jnp.float64
        return scalar.astype(jnp.float32) if wider else scalar

    given = scalars._asdict()
    if scalars.accept is None:
        del given["accept"]
    return scalars._replace(**{name: narrow(name, value) for name, value in given.items()})
