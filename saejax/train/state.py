"""Creation of the training state, sharded from the start, and its export as a module."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax.model.init import geometric_median, init_params, match_scale
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig
from saejax.train import guard
from saejax.train.optim import OptimizerConfig, corrected_ema, renormalize_decoder
from saejax.types import Params, TrainState


def initial_pre_bias(kind: str, rows_ND: np.ndarray) -> np.ndarray:
    """`[D]` initial pre_bias from normalised sample rows (Gao et al. 2024, App. A.1)."""
    if kind == "zeros":
        return np.zeros(rows_ND.shape[1])
    if kind == "mean":
        return np.asarray(rows_ND, np.float64).mean(0)
    return geometric_median(rows_ND)


def total_variance(rows_ND: np.ndarray) -> float:
    """`E||x - E x||^2` of the sample, in float64.

    Raises:
      ValueError: the sample does not vary, so that no error could be normalised by it.
    """
    rows = np.asarray(rows_ND, np.float64)
    variance = float(np.square(rows - rows.mean(0)).sum(-1).mean())
    if not variance > 0:
        raise ValueError(
            f"the sample of {len(rows)} activations has total variance {variance}, by which errors "
            f"are divided; it must be above 0: give activations that are not all the same"
        )
    return variance


def build_state(
    params: Params,
    config: SAEConfig,
    optimizer: OptimizerConfig,
    steps: int,
    variance: jax.Array,
) -> TrainState:
    """The state at step 0 around fresh parameters, as a pure function."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.transformation(config.n_latents, steps).init(params),
        ema=None if optimizer.ema_decay is None else jax.tree.map(jnp.zeros_like, params),
        tokens_since_fired=jnp.zeros(config.n_latents, jnp.int32),
        variance=variance.astype(jnp.float32),
        guard=guard.fresh(),
    )


def abstract_state(config: SAEConfig, optimizer: OptimizerConfig, steps: int) -> TrainState:
    """Shapes and dtypes of the state, without allocating it."""

    def build():
        params = init_params(jax.random.key(0), jnp.zeros(config.d_model), config.n_latents)
        return build_state(params, config, optimizer, steps, jnp.ones(()))

    return jax.eval_shape(build)


def params_creator(config: SAEConfig, mesh: Mesh) -> Callable[[jax.Array, jax.Array], Params]:
    """The function `(key, pre_bias) -> params` that `create` compiles."""

    def build(key, pre_bias_D):
        params = init_params(key, pre_bias_D, config.n_latents, parallel=config.parallel_init)
        if not config.match_encoder_scale:
            return params
        # Each device draws its own rows alone; nothing else would make it hold all of them.
        params = jax.lax.with_sharding_constraint(params, mesh_lib.tree_shardings(mesh, params))
        return match_scale(params, key, config.k, mesh)

    return build


def create(
    seed: int,
    config: SAEConfig,
    optimizer: OptimizerConfig,
    steps: int,
    sample_ND: np.ndarray,
    mesh: Mesh,
) -> TrainState:
    """A fresh state laid out on `mesh`; no device ever holds more than its shards.

    Args:
      seed: of the initial weights.
      config: of the model.
      optimizer: decides the optimizer state and whether an EMA is kept.
      steps: total steps, for the schedule.
      sample_ND: normalised rows: the pre_bias and the variance are measured on them.
      mesh: the device mesh.
    """
    shardings = mesh_lib.tree_shardings(mesh, abstract_state(config, optimizer, steps))
    pre_bias = np.asarray(initial_pre_bias(config.pre_bias_init, sample_ND), np.float32)
    # Drawn before the rest exists: what drawing takes beside the weights fits where that will lie.
    draw = jax.jit(params_creator(config, mesh), out_shardings=shardings.params)
    params = draw(jax.random.key(seed), pre_bias)
    build = jax.jit(
        lambda params, variance: build_state(params, config, optimizer, steps, variance),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return build(params, np.float32(total_variance(sample_ND)))


def export(
    state: TrainState,
    config: SAEConfig,
    optimizer: OptimizerConfig,
    normalizer: Normalizer,
    mesh: Mesh | None = None,
) -> SAE:
    """The model of a state: the bias-corrected EMA where one is kept, else the last weights.

    It stays on `mesh`, if one is given: nothing gathers its latents.
    """
    params, updates = state.params, int(state.guard.updates)
    if state.ema is not None and updates > 0:
        params = corrected_ema(state.ema, optimizer.ema_decay, updates)
        if optimizer.unit_norm_decoder:
            # An average of unit vectors is shorter than one.
            params = renormalize_decoder(params)
    return SAE(config, params, normalizer, mesh)
