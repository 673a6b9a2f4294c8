"""The two operations one after the other."""

from pallas_kernels.row_update import xla as rows
from pallas_kernels.weight_grads import xla as grads


def weight_grads_update(
    values_BK,
    d_values_BK,
    indices_BK,
    e_BD,
    x_BD,
    dec,
    enc,
    scalars,
    *,
    dec_settings,
    enc_settings,
    copy_dtype=None,
):
    """See `pallas_kernels.weight_grads_update.api.weight_grads_update`."""
    pairs = (values_BK, d_values_BK, indices_BK, e_BD, x_BD)
    g_dec_LD, g_enc_LD, g_bias_L = grads.weight_grads(*pairs, len(dec.w_LD))

    def update(rows_of, g_LD, settings):
        w_LD, mu_LD, nu_LD, ema_LD = rows_of
        state = (w_LD, g_LD, mu_LD, nu_LD, ema_LD)
        return rows.row_update(*state, scalars, settings=settings, copy_dtype=copy_dtype)

    return update(dec, g_dec_LD, dec_settings), update(enc, g_enc_LD, enc_settings), g_bias_L
