"""The loss as the paper writes it, over dense codes, with gradients by autodiff: for debugging.

What the sparse step is checked against, on any mesh: it holds `[B, L]` arrays, several of them, so
it is for small models. Selected by `Kernels.gradients = "dense"`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from saejax.model import sparse
from saejax.train.loss import COUNTER_LIMIT, LossSpec, Selection
from saejax.types import Params


def dense_gradients(
    params: Params,
    since_L: jax.Array,
    variance: jax.Array,
    x_BD: jax.Array,
    spec: LossSpec,
    shards: int,
) -> tuple[Params, jax.Array, dict[str, Any]]:
    """Gradients and sums of one batch, as `train.step.local_gradients` has them.

    Args:
      params: all parameters.
      since_L: tokens since each latent fired.
      variance: the loss constant.
      x_BD: normalised activations.
      spec: static settings.
      shards: latent shards, each of which offers its capacity of candidates.
    """
    fired_L = _reconstruct(params, x_BD, spec.main, spec, shards)[1].any(0)
    since_L = jnp.where(fired_L, 0, jnp.minimum(since_L, COUNTER_LIMIT) + len(x_BD))
    dead_L = since_L >= spec.dead_tokens

    def loss(params):
        e_BD, on_BL, main_cut = _reconstruct(params, x_BD, spec.main, spec, shards)
        squared = jnp.square(e_BD).sum()
        total, sums = squared, {"squared_error": squared, "at_capacity": main_cut}
        multi = cut = jnp.zeros((), jnp.int32)
        if spec.multi is not None:
            wide_BD, _, cut = _reconstruct(params, x_BD, spec.multi, spec, shards)
            multi = jnp.square(wide_BD).sum()
            total = total + spec.multi_coefficient * multi
        sums |= {"multi_squared_error": multi, "multi_at_capacity": cut}
        sums |= {"active": on_BL.sum(dtype=jnp.int32), "dead": dead_L.sum(dtype=jnp.int32)}
        auxk, skipped, aux_cut = _auxk(
            params, x_BD, jax.lax.stop_gradient(e_BD), dead_L, spec, shards
        )
        sums |= {"auxk": auxk, "auxk_skipped": skipped, "auxk_at_capacity": aux_cut}
        sums |= {"reselected": jnp.zeros((), jnp.int32)}
        return total / (len(x_BD) * variance) + spec.auxk_coefficient * auxk, sums

    gradients, sums = jax.grad(loss, has_aux=True)(params)
    sums["multi_squared_error"] = sums["multi_squared_error"].astype(sums["auxk"].dtype)
    return gradients, since_L, sums


def _reconstruct(params: Params, x_BD, wanted: Selection, spec: LossSpec, shards: int):
    """The error of a reconstruction, what is active, and the (token, shard) pairs at capacity."""
    h_BL = _pre_activations(params, x_BD, spec)
    mask_BL, cut = _selected(h_BL, wanted, shards)
    code_BL = _code(h_BL, mask_BL, spec)
    rounded = params["w_dec"].astype(spec.dtype).astype(code_BL.dtype)
    x_hat_BD = sparse.matmul(code_BL, rounded) + params["pre_bias"]
    return x_BD - x_hat_BD, code_BL != 0, cut


def _auxk(params: Params, x_BD, e_BD, dead_L, spec: LossSpec, shards: int):
    if not spec.auxk_coefficient:
        none = jnp.zeros((), jnp.int32)
        return jnp.zeros((), e_BD.dtype), none, none
    h_BL = jnp.where(dead_L, _pre_activations(params, x_BD, spec), -jnp.inf)
    mask_BL, cut = _selected(h_BL, spec.aux, shards)
    code_BL = _code(jnp.where(dead_L, h_BL, 0), mask_BL & dead_L, spec)
    rest_BD = e_BD - sparse.matmul(code_BL, params["w_dec"].astype(code_BL.dtype))
    mean_D = e_BD.mean(0)
    spread = jnp.square(e_BD - mean_D).sum()
    rounding = jnp.square(4 * jnp.finfo(spread.dtype).eps * mean_D).sum() * len(x_BD)
    error, any_dead = jnp.square(rest_BD).sum(), dead_L.any()
    usable = jnp.isfinite(error / spread) & (spread > rounding)
    # Divided by 1 where it is left out: the gradient of what `where` drops must be finite too.
    auxk = jnp.where(any_dead & usable, error, 0) / jnp.where(usable, spread, 1)
    return auxk, (any_dead & ~usable).astype(jnp.int32), cut


def _pre_activations(params: Params, x_BD, spec: LossSpec):
    biases = (params["latent_bias"], params["pre_bias"])
    return sparse.pre_activations(x_BD, params["w_enc"], *biases, spec.dtype)


def _code(h_BL, mask_BL, spec: LossSpec):
    kept_BL = jnp.where(mask_BL, h_BL, 0)
    # Not jnp.maximum's gradient at 0, nor a comparison that would drop NaN.
    return jnp.where(kept_BL <= 0, 0, kept_BL) if spec.relu else kept_BL


def _selected(h_BL, wanted: Selection, shards: int):
    """`[B, L]` mask of the k largest of what the shards offer, and how often one was cut short."""
    h_BL = jax.lax.stop_gradient(h_BL)
    by_shard = h_BL.reshape(len(h_BL), shards, -1)
    capacity = min(wanted.capacity, by_shard.shape[-1])
    offered = _best(by_shard, capacity)
    all_BL = jnp.where(offered.reshape(h_BL.shape), h_BL, -jnp.inf)
    kept_BL = _best(all_BL, min(wanted.k, h_BL.shape[1])) & (all_BL != -jnp.inf)
    more = (by_shard != -jnp.inf).sum(-1) > capacity
    full = kept_BL.reshape(by_shard.shape).sum(-1) == capacity
    cut = jnp.zeros((), jnp.int32)
    if capacity < min(wanted.k, by_shard.shape[-1]):
        cut = (full & more).sum(dtype=jnp.int32)
    return kept_BL, cut


def _best(x: jax.Array, k: int) -> jax.Array:
    order = jnp.argsort(x, axis=-1, descending=True, stable=True)[..., :k]
    return jnp.put_along_axis(jnp.zeros(x.shape, bool), order, True, axis=-1, inplace=False)
