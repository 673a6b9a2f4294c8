"""One training step: gradients on each device's shards, then the update, in one program."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from saejax import collectives
from saejax import mesh as mesh_lib
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train import optim
from saejax.train.loss import LossConfig, LossSpec, auxk_error, reconstruction_loss
from saejax.types import Params, StepMetrics, TrainState

# Dead latents are gathered into a block of the first capacity that holds them.
_AUXK_CAPACITY_GROWTH = 8
_COUNTER_LIMIT = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Static settings of the step.

    Attributes:
      loss: of the loss functions.
      normalizer: applied to the raw activations.
      batch_tokens: tokens per step over the whole mesh.
      chunks: blocks that each data row's tokens are processed in; the result does not depend on
        it beyond rounding.
    """

    loss: LossSpec
    normalizer: Normalizer
    batch_tokens: int
    chunks: int


def loss_spec(sae: SAEConfig, loss: LossConfig) -> LossSpec:
    """Resolves the loss settings for a model.

    Raises:
      ValueError: k_aux or the Multi-TopK k exceeds the number of latents.
    """
    k_aux = loss.resolve_k_aux(sae.d_model, sae.n_latents)
    if k_aux > sae.n_latents:
        raise ValueError(
            f"Loss.k_aux = {k_aux} must not exceed SAE.n_latents = {sae.n_latents}; lower it, or "
            f"leave it None for a power of two near d_model / 2"
        )
    k_multi = sae.k * loss.multi_topk_factor if loss.multi_topk_coefficient else 0
    if k_multi > sae.n_latents:
        raise ValueError(
            f"Loss.multi_topk_factor = {loss.multi_topk_factor} times SAE.k = {sae.k} exceeds "
            f"SAE.n_latents = {sae.n_latents}; lower one of them or set "
            f"Loss.multi_topk_coefficient = 0"
        )
    return LossSpec(
        k=sae.k,
        k_aux=k_aux,
        k_multi=k_multi,
        multi_coefficient=loss.multi_topk_coefficient,
        auxk_coefficient=loss.auxk_coefficient,
        dead_tokens=loss.dead_tokens,
        relu=sae.relu,
        dtype=sae.dtype,
    )


def _auxk_capacities(k_aux: int, n_latents: int) -> list[int]:
    """Block sizes for dead latents, from 0 to all of a shard's latents."""
    sizes, size = [0], min(k_aux, n_latents)
    while size < n_latents:
        sizes.append(size)
        size *= _AUXK_CAPACITY_GROWTH
    return [*sizes, n_latents]


def _accumulate(fn: Callable, params: Params, *chunked: jax.Array):
    """Sums gradients of a scalar `fn(params, *chunk) -> (loss, aux)` over leading chunks.

    Returns the summed gradient, the summed loss, and the stacked aux.
    """
    grad_fn = jax.value_and_grad(fn, has_aux=True)

    def one(total, chunk):
        (loss, aux), gradient = grad_fn(params, *chunk)
        return jax.tree.map(jnp.add, total, (gradient, loss)), aux

    loss_dtype = chunked[0].dtype
    zero = (jax.tree.map(jnp.zeros_like, params), jnp.zeros((), loss_dtype))
    (gradient, loss), aux = jax.lax.scan(one, zero, chunked)
    return gradient, loss, aux


def _add_auxk(capacity, gradients, params, dead_L, x_NBD, e_NBD, spec: StepSpec):
    """Adds the AuxK gradient, its dead latents gathered into a block of `capacity` rows.

    Returns the gradients, the normalised AuxK loss, and 1 if it was not finite and left out.
    """
    zero = jnp.zeros((), e_NBD.dtype)
    if capacity == 0:
        return gradients, zero, jnp.zeros((), jnp.int32)
    n_latents = dead_L.shape[0]
    (rows_C,) = jnp.nonzero(dead_L, size=capacity, fill_value=n_latents)
    block = {name: params[name][rows_C] for name in ("w_enc", "w_dec", "latent_bias")}
    block["pre_bias"] = params["pre_bias"]

    def error(block, x_BD, e_BD):
        return auxk_error(block, rows_C == n_latents, x_BD, e_BD, spec.loss), None

    block_gradient, error_sum, _ = _accumulate(error, block, x_NBD, e_NBD)
    mean_D = collectives.reduce_over_data(e_NBD.sum((0, 1))) / spec.batch_tokens
    spread = collectives.reduce_over_data(jnp.square(e_NBD - mean_D).sum())
    auxk = collectives.reduce_over_data(error_sum) / spread
    # A residual that is the same for every token spreads by rounding alone: not a scale.
    rounding = jnp.square(4 * jnp.finfo(spread.dtype).eps * mean_D).sum() * spec.batch_tokens
    finite = jnp.isfinite(auxk) & (spread > rounding)

    def add(total, update, rows=None):
        update = jnp.where(finite, update * (spec.loss.auxk_coefficient / spread), 0)
        return total + update if rows is None else total.at[rows].add(update, mode="drop")

    gradients = {
        name: add(gradients[name], block_gradient[name], None if name == "pre_bias" else rows_C)
        for name in gradients
    }
    return gradients, jnp.where(finite, auxk, 0), 1 - finite.astype(jnp.int32)


def local_gradients(params: Params, since_L, variance, x_bD, spec: StepSpec):
    """Gradients and sums of one batch, on one device's shards (inside `mesh.per_device`).

    Args:
      params: this latent shard's parameters.
      since_L: tokens since each of its latents fired.
      variance: the loss constant.
      x_bD: raw activations this device was fed.
      spec: static settings.

    Returns:
      (gradients, tokens since fired, dict of global sums).
    """
    x_BD, _, _ = spec.normalizer.apply(collectives.gather_tokens(x_bD))
    x_NBD = x_BD.reshape(spec.chunks, -1, x_BD.shape[-1])

    def error(params, x_BD):
        return reconstruction_loss(params, x_BD, spec.loss)

    gradients, _, seen = _accumulate(error, params, x_NBD)
    scale = 1 / (spec.batch_tokens * variance)
    gradients = jax.tree.map(lambda g: g * scale, gradients)

    fired_L = collectives.any_over_data(seen.fired.sum(0) > 0)
    since_L = jnp.where(fired_L, 0, jnp.minimum(since_L, _COUNTER_LIMIT) + spec.batch_tokens)
    dead_L = since_L >= spec.loss.dead_tokens
    n_dead = dead_L.sum(dtype=jnp.int32)
    auxk, skipped = jnp.zeros((), x_BD.dtype), jnp.zeros((), jnp.int32)
    if spec.loss.auxk_coefficient:
        capacities = _auxk_capacities(spec.loss.k_aux, dead_L.shape[0])
        # The same branch everywhere: the branches talk to each other.
        most_dead = collectives.largest_over_latents(n_dead)
        branch = sum((most_dead > size).astype(jnp.int32) for size in capacities[:-1])
        branches = [
            lambda g, size=size: _add_auxk(size, g, params, dead_L, x_NBD, seen.residual, spec)
            for size in capacities
        ]
        gradients, auxk, skipped = jax.lax.switch(branch, branches, gradients)

    sums = collectives.reduce_over_data(
        {
            "squared_error": seen.squared_error.sum(),
            "multi_squared_error": seen.multi_squared_error.sum(),
            "active": collectives.reduce_over_latents(seen.active.sum()),
        }
    )
    sums |= {"dead": collectives.reduce_over_latents(n_dead), "auxk": auxk, "skipped": skipped}
    return collectives.reduce_over_data(gradients), since_L, sums


def apply_gradients(
    state: TrainState,
    gradients: Params,
    tx: optax.GradientTransformation,
    sae: SAEConfig,
    optimizer: optim.OptimizerConfig,
) -> tuple[TrainState, jax.Array]:
    """Projection, clipping, Adam, unit norm, EMA, in that order; and the gradient's norm."""
    if not sae.latent_bias:
        gradients = gradients | {"latent_bias": jnp.zeros_like(gradients["latent_bias"])}
    if optimizer.project_decoder_gradient:
        gradients = optim.project_decoder_gradient(gradients, state.params)
    grad_norm = optax.tree.norm(gradients)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if optimizer.unit_norm_decoder:
        params = optim.renormalize_decoder(params)
    ema = state.ema
    if ema is not None:
        ema = optim.update_ema(ema, params, optimizer.ema_decay)
    state = dataclasses.replace(
        state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema
    )
    return state, grad_norm


def make_step(
    sae: SAEConfig,
    loss: LossConfig,
    optimizer: optim.OptimizerConfig,
    normalizer: Normalizer,
    mesh: Mesh,
    *,
    batch_tokens: int,
    chunks: int,
    steps: int,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, StepMetrics]]:
    """The undecorated step `(state, raw activations [B, D]) -> (state, metrics)`; see `jit_step`.

    Raises:
      ValueError: the loss settings do not fit the model.
    """
    spec = StepSpec(
        loss=loss_spec(sae, loss), normalizer=normalizer, batch_tokens=batch_tokens, chunks=chunks
    )
    tx = optimizer.transformation(sae.n_latents, steps)
    rate = optimizer.schedule(sae.n_latents, steps)

    def step(state: TrainState, x_BD: jax.Array) -> tuple[TrainState, StepMetrics]:
        sharded = mesh_lib.per_device(
            functools.partial(local_gradients, spec=spec),
            mesh,
            in_trees=(state.params, "tokens_since_fired", "replicated", "tokens"),
            out_trees=(state.params, "tokens_since_fired", "replicated"),
        )
        gradients, since_L, sums = sharded(
            state.params, state.tokens_since_fired, state.variance, x_BD
        )
        learning_rate = jnp.asarray(rate(state.step), jnp.float32)
        state = dataclasses.replace(state, tokens_since_fired=since_L)
        state, grad_norm = apply_gradients(state, gradients, tx, sae, optimizer)
        return state, StepMetrics(
            tokens=jnp.asarray(batch_tokens, jnp.int32),
            squared_error=sums["squared_error"],
            multi_squared_error=sums["multi_squared_error"],
            active=sums["active"],
            dead=sums["dead"],
            auxk=sums["auxk"],
            auxk_skipped=sums["skipped"],
            grad_norm=grad_norm,
            learning_rate=learning_rate,
        )

    return step


def jit_step(step: Callable, abstract: TrainState, mesh: Mesh) -> Callable:
    """Compiles a step once: state sharded by the table and donated, tokens over the mesh."""
    shardings = mesh_lib.tree_shardings(mesh, abstract)
    return jax.jit(
        step,
        in_shardings=(shardings, mesh_lib.token_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
