"""The two operations' plain definitions, one after the other."""

from pallas_kernels.row_update import reference as rows
from pallas_kernels.weight_grads import reference as grads


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
    done = [
        rows.row_update(w_LD, g_LD, *state, scalars, settings=settings, copy_dtype=copy_dtype)
        for (w_LD, *state), g_LD, settings in (
            (dec, g_dec_LD, dec_settings),
            (enc, g_enc_LD, enc_settings),
        )
    ]
    return *done, g_bias_L
