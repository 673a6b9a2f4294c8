"""Plain definition of the update, matrix by matrix."""

import jax
import jax.numpy as jnp


def row_update(w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars, *, settings, copy_dtype=None):
    """See `pallas_kernels.row_update.api.row_update`."""
    old = (w_LD, mu_LD, nu_LD, ema_LD)
    g_LD = g_LD.astype(w_LD.dtype)
    if settings.project:
        unit_LD = _unit_rows(w_LD)
        g_LD = g_LD - (g_LD * unit_LD).sum(-1, keepdims=True) * unit_LD
    squared_norm_L = jnp.square(g_LD).sum(-1)
    g_LD = g_LD * scalars.scale
    mu_LD = settings.beta1 * mu_LD + (1 - settings.beta1) * g_LD
    nu_LD = settings.beta2 * nu_LD + (1 - settings.beta2) * jnp.square(g_LD)
    step = scalars.step.astype(w_LD.dtype)
    mean_LD = mu_LD / (1 - settings.beta1**step)
    spread_LD = jnp.sqrt(nu_LD / (1 - settings.beta2**step)) + settings.epsilon
    w_LD = w_LD - scalars.learning_rate * mean_LD / spread_LD
    if settings.unit_norm:
        w_LD = _unit_rows(w_LD)
    if ema_LD is not None:
        ema_LD = settings.ema_decay * ema_LD + (1 - settings.ema_decay) * w_LD
    if scalars.accept is not None:
        new = (w_LD, mu_LD, nu_LD, ema_LD)
        w_LD, mu_LD, nu_LD, ema_LD = jax.tree.map(
            lambda a, b: jnp.where(scalars.accept, a, b), new, old
        )
    copy_LD = None if copy_dtype is None else w_LD.astype(copy_dtype)
    return w_LD, mu_LD, nu_LD, ema_LD, copy_LD, squared_norm_L


def _unit_rows(w_LD):
    norm_L1 = jnp.sqrt(jnp.square(w_LD).sum(-1, keepdims=True))
    return w_LD / jnp.where(norm_L1 > 0, norm_L1, 1.0)
