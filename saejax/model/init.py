"""Initialisation (Gao et al. 2024, App. A.1)."""

import jax
import jax.numpy as jnp
import numpy as np

from saejax.model import sparse
from saejax.types import Params

_SCALE_PROBES = 256
_WEISZFELD_STEPS = 200
_WEISZFELD_TOLERANCE = 1e-7


def geometric_median(rows_ND: np.ndarray) -> np.ndarray:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration.

    Args:
      rows_ND: `[N, D]` sample.

    Returns:
      `[D]` float64. Stops when a step moves less than 1e-7 of the data's spread.
    """
    rows = np.asarray(rows_ND, np.float64)
    point = rows.mean(0)
    spread = np.sqrt(np.square(rows - point).sum(-1).mean())
    for _ in range(_WEISZFELD_STEPS):
        distance = np.linalg.norm(rows - point, axis=-1)
        away = distance > 1e-12 * spread
        if not away.any():
            return point
        weight = 1.0 / distance[away]
        pull = weight @ (rows[away] - point)
        # Rows at the point itself hold it with a force of one each (Vardi & Zhang 2000).
        held = min(1.0, (~away).sum() / max(np.linalg.norm(pull), 1e-300))
        moved = point + (1.0 - held) * pull / weight.sum()
        if np.linalg.norm(moved - point) <= _WEISZFELD_TOLERANCE * spread:
            return moved
        point = moved
    return point


def unit_rows(w_LD: jax.Array) -> jax.Array:
    """Every row divided by its norm; a zero row stays zero."""
    norm_L1 = jnp.sqrt(jnp.square(w_LD).sum(-1, keepdims=True))
    return w_LD / jnp.where(norm_L1 > 0, norm_L1, 1.0)


def init_params(
    key: jax.Array,
    pre_bias_D: jax.Array,
    n_latents: int,
    k: int,
    *,
    parallel: bool = True,
    match_scale: bool = True,
) -> Params:
    """Fresh float32 parameters.

    Args:
      key: random key.
      pre_bias_D: `[D]`, the initial pre_bias (geometric median of a sample, in the paper).
      n_latents: L.
      k: latents kept per token; enters the scale only.
      parallel: encoder rows start parallel to the decoder rows (they are never tied); otherwise
        they are drawn independently.
      match_scale: divide the encoder by the norm of the reconstruction of unit vectors about
        pre_bias, so that reconstructions start with the norm of their input.

    Returns:
      w_enc `[L, D]`, w_dec `[L, D]` with unit rows, latent_bias `[L]` zeros, pre_bias `[D]`.
    """
    d_model = pre_bias_D.shape[0]
    key_dec, key_enc, key_probe = jax.random.split(key, 3)
    w_dec_LD = unit_rows(jax.random.normal(key_dec, (n_latents, d_model)))
    w_enc_LD = w_dec_LD
    if not parallel:
        w_enc_LD = unit_rows(jax.random.normal(key_enc, (n_latents, d_model)))
    latent_bias_L = jnp.zeros(n_latents)
    if match_scale:
        probe_BD = unit_rows(jax.random.normal(key_probe, (_SCALE_PROBES, d_model)))
        zero_D = jnp.zeros(d_model)
        values, indices = sparse.encode_top_k(
            probe_BD, w_enc_LD, latent_bias_L, zero_D, k, jnp.dtype("float32")
        )
        out_BD = sparse.decode(jax.nn.relu(values), indices, w_dec_LD, jnp.dtype("float32"))
        w_enc_LD = w_enc_LD / jnp.linalg.norm(out_BD, axis=-1).mean()
    return {
        "w_enc": w_enc_LD,
        "w_dec": w_dec_LD,
        "latent_bias": latent_bias_L,
        "pre_bias": pre_bias_D.astype(jnp.float32),
    }
