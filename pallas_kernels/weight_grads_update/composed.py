"""The two operations one after the other, whichever implementations they are."""

from collections.abc import Callable


def composed(weight_grads: Callable, row_update: Callable) -> Callable:
    """An implementation of `weight_grads_update` that makes the gradients, then the update."""

    def weight_grads_update(*arrays, dec_settings, enc_settings, copy_dtype=None):
        """See `pallas_kernels.weight_grads_update.api.weight_grads_update`."""
        *pairs, dec, enc, scalars = arrays
        g_dec_LD, g_enc_LD, g_bias_L = weight_grads(*pairs, len(dec.w_LD))

        def update(rows, g_LD, settings):
            w_LD, *state = rows
            return row_update(w_LD, g_LD, *state, scalars, settings=settings, copy_dtype=copy_dtype)

        return update(dec, g_dec_LD, dec_settings), update(enc, g_enc_LD, enc_settings), g_bias_L

    return weight_grads_update
