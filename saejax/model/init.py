"""Initialisation (Gao et al. 2024, App. A.1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax import collectives
from saejax import mesh as mesh_lib
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
    key: jax.Array, pre_bias_D: jax.Array, n_latents: int, *, parallel: bool = True
) -> Params:
    """Fresh float32 parameters, the encoder not yet scaled.

    Args:
      key: random key.
      pre_bias_D: `[D]`, the initial pre_bias (geometric median of a sample, in the paper).
      n_latents: L.
      parallel: encoder rows start parallel to the decoder rows (they are never tied); otherwise
        they are drawn independently.

    Returns:
      w_enc and w_dec `[L, D]` with unit rows, latent_bias `[L]` zeros, pre_bias `[D]`.
    """
    key_dec, key_enc, _ = jax.random.split(key, 3)
    shape = (n_latents, pre_bias_D.shape[0])
    w_dec_LD = unit_rows(jax.random.normal(key_dec, shape))
    w_enc_LD = w_dec_LD if parallel else unit_rows(jax.random.normal(key_enc, shape))
    return {
        "w_enc": w_enc_LD,
        "w_dec": w_dec_LD,
        "latent_bias": jnp.zeros(n_latents),
        "pre_bias": pre_bias_D.astype(jnp.float32),
    }


def match_scale(params: Params, key: jax.Array, k: int, mesh: Mesh) -> Params:
    """Divides the encoder by the mean norm of the reconstructions of unit vectors about pre_bias.

    So reconstructions start with the norm of their input. Each device works on its own latents.

    Args:
      params: of `init_params`, with the same key.
      key: random key.
      k: latents kept per token.
      mesh: the device mesh that `params` are laid out on.
    """
    _, _, key_probe = jax.random.split(key, 3)
    probe_BD = unit_rows(jax.random.normal(key_probe, (_SCALE_PROBES, len(params["pre_bias"]))))
    measure = mesh_lib.per_device(
        functools.partial(_reconstruction_norm, k=k),
        mesh,
        in_trees=("w_enc", "w_dec", "replicated"),
        out_trees="replicated",
    )
    norm = measure(params["w_enc"], params["w_dec"], probe_BD)
    return params | {"w_enc": params["w_enc"] / norm}


def _reconstruction_norm(w_enc_LD, w_dec_LD, probe_BD, k: int) -> jax.Array:
    h_BL = sparse.matmul(probe_BD, w_enc_LD.T)
    values_BC, indices_BC = sparse.top_k(h_BL, min(k, h_BL.shape[1]))
    count_B = collectives.count_kept(values_BC, k)
    kept_BC = jnp.arange(values_BC.shape[1]) < count_B[:, None]
    z_BC = jnp.where(kept_BC, jax.nn.relu(values_BC), 0)
    partial_BD = sparse.dense_sparse_matmul(z_BC, indices_BC, w_dec_LD)
    return jnp.linalg.norm(collectives.sum_over_latents(partial_BD), axis=-1).mean()
