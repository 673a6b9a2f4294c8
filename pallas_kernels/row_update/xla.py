"""The update as few passes as XLA makes of it.

No square is written twice alike: XLA would make one that is used twice an array of its own.
"""

import jax
import jax.numpy as jnp
from jax import lax


def row_update(w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars, *, settings, copy_dtype=None):
    """See `pallas_kernels.row_update.api.row_update`."""

    def updated(*arrays):
        return _updated(*arrays, scalars, settings, copy_dtype)

    def kept(w_LD, g_LD, mu_LD, nu_LD, ema_LD):
        copy_LD = None if copy_dtype is None else w_LD.astype(copy_dtype)
        g_LD = _gradient(w_LD, g_LD, settings)
        return w_LD, mu_LD, nu_LD, ema_LD, copy_LD, _inner(g_LD, g_LD)

    arrays = (w_LD, g_LD, mu_LD, nu_LD, ema_LD)
    if scalars.accept is None:
        return updated(*arrays)
    # Not a choice of every entry: a branch leaves the program of the update as it is, in place.
    return lax.cond(scalars.accept, updated, kept, *arrays)


def _updated(w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars, settings, copy_dtype):
    g_LD = _gradient(w_LD, g_LD, settings)
    squared_norm_L = _inner(g_LD, g_LD)
    g_LD = g_LD * scalars.scale
    mu_LD = settings.beta1 * mu_LD + (1 - settings.beta1) * g_LD
    nu_LD = settings.beta2 * nu_LD + ((1 - settings.beta2) * g_LD) * g_LD
    step = scalars.step.astype(w_LD.dtype)
    rate = scalars.learning_rate / (1 - settings.beta1**step)
    spread_LD = jnp.sqrt(nu_LD * (1 / (1 - settings.beta2**step))) + settings.epsilon
    w_LD = w_LD - rate * mu_LD / spread_LD
    if settings.unit_norm:
        norm_L = jnp.sqrt(_inner(w_LD, w_LD))
        w_LD = w_LD / jnp.where(norm_L > 0, norm_L, 1.0)[:, None]
    if ema_LD is not None:
        ema_LD = settings.ema_decay * ema_LD + (1 - settings.ema_decay) * w_LD
    copy_LD = None if copy_dtype is None else w_LD.astype(copy_dtype)
    return w_LD, mu_LD, nu_LD, ema_LD, copy_LD, squared_norm_L


def _gradient(w_LD, g_LD, settings) -> jax.Array:
    g_LD = g_LD.astype(w_LD.dtype)
    if not settings.project:
        return g_LD
    squared_L = _inner(w_LD, w_LD)
    along_L = _inner(g_LD, w_LD) / jnp.where(squared_L > 0, squared_L, 1.0)
    return g_LD - along_L[:, None] * w_LD


def _inner(a_LD: jax.Array, b_LD: jax.Array) -> jax.Array:
    return jnp.einsum("ld,ld->l", a_LD, b_LD, precision=lax.Precision.HIGHEST)
