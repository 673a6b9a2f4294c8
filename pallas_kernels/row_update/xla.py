"""The update as XLA fuses it."""

from pallas_kernels.row_update import reference


def row_update(w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars, *, settings, copy_dtype=None):
    """See `pallas_kernels.row_update.api.row_update`."""
    state = (w_LD, g_LD, mu_LD, nu_LD, ema_LD)
    return reference.row_update(*state, scalars, settings=settings, copy_dtype=copy_dtype)
