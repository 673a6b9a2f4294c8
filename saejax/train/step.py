"""One training step: gradients on each device's shards, then the update, in one program."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax import collectives
from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.model import sparse
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train import optim
from saejax.train.dense import dense_gradients
from saejax.train.guard import GuardConfig
from saejax.train.loss import (
    COUNTER_LIMIT,
    LossConfig,
    Reconstruction,
    add_auxk,
    add_reconstruction,
)
from saejax.train.spec import KernelConfig, StepSpec, step_spec
from saejax.train.update import Judged, apply_by_optax, apply_gradients
from saejax.types import GuardState, Params, StepMetrics, TrainState

# Dead latents are gathered into a block of the first capacity that holds them.
_AUXK_CAPACITY_GROWTH = 8


def auxk_capacities(k_aux: int, n_latents: int) -> list[int]:
    """Block sizes for dead latents, from 0 to all of a shard's latents."""
    sizes, size = [0], min(k_aux, n_latents)
    while size < n_latents:
        sizes.append(size)
        size *= _AUXK_CAPACITY_GROWTH
    return [*sizes, n_latents]


def auxk_block_tokens(
    own_tokens: int, shards: int, capacity: int, platform: str | None = None
) -> int:
    """Own tokens of a block of AuxK, whose pre-activations are then as `topk_encode` bounds.

    Blocks are equal where a number of them not far above the least one divides the tokens; else
    the last of each microbatch is smaller.

    Args:
      own_tokens: of a microbatch and device.
      shards: latent shards, whose tokens each sees.
      capacity: rows of the block of dead latents.
      platform: None is that of the target in force.
    """
    most = max(sparse.block_tokens(capacity, platform=platform) // shards, 1)
    wanted = -(-own_tokens // most)
    few = range(wanted, min(4 * wanted, own_tokens) + 1)
    blocks = next((blocks for blocks in few if own_tokens % blocks == 0), wanted)
    return -(-own_tokens // blocks)


def _compute_weights(params: Params, dtype: jnp.dtype) -> Params:
    """The matrices in the compute dtype, once a step."""
    return params | {name: params[name].astype(dtype) for name in ("w_enc", "w_dec")}


def _auxk_gradients(capacity, params, weights, dead_L, x_NbD, e_NbD, scale, spec: StepSpec):
    """Gradients of the AuxK loss, its dead latents gathered into a block of `capacity` rows.

    Returns gradients of the block's rows, the rows' latents (L where unused), the squared error
    and the tokens at capacity, summed over this device's rows.
    """
    n_latents = dead_L.shape[0]
    if capacity == n_latents:
        rows_C, alive_C, block = jnp.arange(n_latents), ~dead_L, weights
    else:
        (rows_C,) = jnp.nonzero(dead_L, size=capacity, fill_value=n_latents)
        alive_C = rows_C == n_latents
        block = {name: weights[name][rows_C] for name in ("w_enc", "w_dec", "latent_bias")}
        block["pre_bias"] = weights["pre_bias"]

    # No array of tokens times dead latents exists either: the more there are, the smaller a block.
    microbatches, tokens, _ = x_NbD.shape
    size = auxk_block_tokens(tokens, collectives.latent_shards(), capacity)

    def add_blocks(total, first, count, size):
        """Adds `count` blocks of each microbatch, from its token `first` on."""

        def one(total, i):
            start = (i // count, first + i % count * size, 0)
            x_bD, e_bD = (
                jax.lax.dynamic_slice(a, start, (1, size, a.shape[2]))[0] for a in (x_NbD, e_NbD)
            )
            total, error, cut = add_auxk(total, block, alive_C, x_bD, e_bD, scale, spec.loss)
            return total, (error, cut)

        total, (errors, cuts) = jax.lax.scan(one, total, jnp.arange(microbatches * count))
        return total, errors.sum(), cuts.sum(dtype=jnp.int32)

    zero = {
        name: jnp.zeros(block[name].shape, params[name].dtype)
        for name in ("w_enc", "w_dec", "latent_bias")
    }
    total, error, cut = add_blocks(zero, 0, tokens // size, size)
    if rest := tokens % size:
        total, last_error, last_cut = add_blocks(total, tokens - rest, 1, rest)
        error, cut = error + last_error, cut + last_cut
    return total, rows_C, error, cut


def _add_auxk(capacity, gradients, params, weights, dead_L, x_NbD, e_NbD, spec: StepSpec):
    """Adds the AuxK gradient.

    Returns the gradients, the normalised AuxK loss, 1 if it was not finite and left out, and the
    tokens at capacity.
    """
    none, dtype = jnp.zeros((), jnp.int32), gradients["w_dec"].dtype
    if capacity == 0:
        return gradients, jnp.zeros((), dtype), none, none
    mean_D = collectives.sum_over_mesh(e_NbD.sum((0, 1), dtype=dtype)) / spec.batch_tokens
    spread = collectives.sum_over_mesh(jnp.square(e_NbD - mean_D).sum())
    update, rows_C, error, cut = _auxk_gradients(
        capacity, params, weights, dead_L, x_NbD, e_NbD, 1 / spread, spec
    )
    auxk = collectives.sum_over_mesh(error) / spread
    # A residual that is the same for every token spreads by rounding alone: not a scale.
    rounding = jnp.square(4 * jnp.finfo(spread.dtype).eps * mean_D).sum() * spec.batch_tokens
    finite = jnp.isfinite(auxk) & (spread > rounding)
    update = collectives.reduce_over_data(update)
    whole = capacity == dead_L.shape[0]
    for name, rows in update.items():
        rows = jnp.where(finite, rows * spec.loss.auxk_coefficient, 0)
        total = gradients[name]
        if whole:
            total = total + rows
        else:  # said to be distinct, so that a GPU adds them without atomics
            total = total.at[rows_C].add(rows, mode="drop", unique_indices=True)
        gradients = gradients | {name: total}
    return gradients, jnp.where(finite, auxk, 0), 1 - finite.astype(jnp.int32), cut


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
    x_bD, _, _ = spec.normalizer.apply(x_bD)
    x_NbD = x_bD.reshape(spec.chunks, -1, x_bD.shape[-1])
    weights = _compute_weights(params, spec.loss.dtype)
    scale = 1 / (spec.batch_tokens * variance)

    def one(total, x_bD):
        return add_reconstruction(total, weights, x_bD, scale, spec.loss)

    # -0 adds nothing either: had both matrices the same start, XLA would fill one and copy it.
    start = jax.tree.map(jnp.zeros_like, params) | {"w_enc": -jnp.zeros_like(params["w_enc"])}
    gradients, seen = jax.lax.scan(one, start, x_NbD)

    if not spec.loss.gather_codes:
        # Before AuxK, whose gradients are of few rows and follow by themselves, so that the sum of
        # these may run under it.
        of_latents = {name: gradients[name] for name in ("w_enc", "w_dec", "latent_bias")}
        gradients = gradients | collectives.reduce_over_data(of_latents)
    fired_L = collectives.any_over_data(seen.fired.any(0))
    since_L = jnp.where(fired_L, 0, jnp.minimum(since_L, COUNTER_LIMIT) + spec.batch_tokens)
    dead_L = since_L >= spec.loss.dead_tokens
    gradients, auxk = _auxk(gradients, params, weights, dead_L, x_NbD, seen.residual, spec)

    # Summed over the batch before it meets the encoder (Gao et al. 2024, App. D).
    through_encoder_D = -sparse.matmul(gradients["latent_bias"], params["w_enc"])
    shared = through_encoder_D / collectives.data_rows() + gradients["pre_bias"]
    gradients = gradients | {"pre_bias": collectives.sum_over_mesh(shared)}
    return gradients, since_L, _sums(seen, dead_L, auxk)


def _auxk(gradients, params, weights, dead_L, x_NbD, e_NbD, spec: StepSpec):
    """`_add_auxk` at the smallest capacity that holds the dead latents of every shard."""
    none = jnp.zeros((), jnp.int32)
    if not spec.loss.auxk_coefficient:
        return gradients, (jnp.zeros((), gradients["w_dec"].dtype), none, none)
    capacities = auxk_capacities(spec.loss.aux.k, dead_L.shape[0])
    # The same branch everywhere: the branches talk to each other.
    most_dead = collectives.largest_over_latents(dead_L.sum(dtype=jnp.int32))
    branch = sum((most_dead > size).astype(jnp.int32) for size in capacities[:-1])

    def at(capacity):
        return lambda g: _add_auxk(capacity, g, params, weights, dead_L, x_NbD, e_NbD, spec)

    with jax.named_scope("auxk"):
        gradients, *rest = jax.lax.switch(branch, [at(size) for size in capacities], gradients)
    return gradients, tuple(rest)


def _sums(seen: Reconstruction, dead_L: jax.Array, auxk: tuple) -> dict[str, jax.Array]:
    """The step's sums over the whole mesh; those of `auxk` but the last are global already."""
    auxk_loss, skipped, auxk_cut = auxk
    counts = (seen.active, seen.cut, seen.multi_cut, auxk_cut, seen.reselected)
    counts = jnp.stack([count.sum(dtype=jnp.int32) for count in counts])
    active, cut, multi_cut, auxk_cut, reselected = collectives.sum_over_mesh(counts)
    errors = jnp.stack([seen.squared_error.sum(), seen.multi_squared_error.sum()])
    squared_error, multi_squared_error = collectives.sum_over_mesh(errors)
    return {
        "squared_error": squared_error,
        "multi_squared_error": multi_squared_error,
        "active": active,
        "dead": collectives.sum_over_latents(dead_L.sum(dtype=jnp.int32)),
        "auxk": auxk_loss,
        "auxk_skipped": skipped,
        "at_capacity": cut,
        "multi_at_capacity": multi_cut,
        "auxk_at_capacity": auxk_cut,
        "reselected": reselected,
    }


def make_step(
    sae: SAEConfig,
    loss: LossConfig,
    optimizer: optim.OptimizerConfig,
    topk: TopKConfig,
    normalizer: Normalizer,
    mesh: Mesh,
    *,
    batch_tokens: int,
    chunks: int,
    steps: int,
    data_exchange: str = "auto",
    kernels: KernelConfig = KernelConfig(),
    guard: GuardConfig = GuardConfig(),
) -> Callable[[TrainState, jax.Array], tuple[TrainState, StepMetrics]]:
    """The undecorated step `(state, raw activations [B, D]) -> (state, metrics)`; see `jit_step`.

    Args:
      sae, loss, optimizer, topk: the configurations.
      normalizer: applied to the raw activations.
      mesh: the device mesh.
      batch_tokens, chunks: tokens per step over the whole mesh, and their microbatches.
      steps: of the whole training, for the schedule.
      data_exchange: see `MeshConfig`.
      kernels, guard: how the gradients are computed, and which steps are skipped.

    Raises:
      ValueError: the loss settings do not fit the model.
    """
    shape, device = mesh_lib.shape_of(mesh), mesh.devices.flat[0]
    spec = step_spec(
        *(sae, loss, topk, normalizer, shape),
        batch_tokens=batch_tokens,
        chunks=chunks,
        platform=device.platform,
        device_kind=device.device_kind,
        data_exchange=data_exchange,
    )
    dense = kernels.gradients == "dense"
    gradients_of = _dense_gradients if dense else _sparse_gradients
    rate = optimizer.schedule(sae.n_latents, steps)

    def step(state: TrainState, x_BD: jax.Array) -> tuple[TrainState, StepMetrics]:
        gradients, since_L, sums = gradients_of(state, x_BD, spec, mesh)
        if not sae.latent_bias:
            gradients |= {"latent_bias": jnp.zeros_like(gradients["latent_bias"])}
        learning_rate = jnp.asarray(rate(state.step))
        judged = Judged(sums["squared_error"] / (batch_tokens * state.variance), guard)
        if dense:
            tx = optimizer.transformation(sae.n_latents, steps)
            state, grad_norm = apply_by_optax(state, gradients, since_L, judged, tx, optimizer)
        else:
            state, grad_norm = apply_gradients(
                state, gradients, since_L, judged, learning_rate, optimizer, mesh
            )
        rates = {"grad_norm": grad_norm, "learning_rate": learning_rate.astype(jnp.float32)}
        counts = _counts(batch_tokens, shape.latent) | _skips(state.guard)
        return state, StepMetrics(**counts, **rates, **sums)

    return _traced_for(device, kernels, step)


def _counts(batch_tokens: int, shards: int) -> dict[str, jax.Array]:
    return {
        "tokens": jnp.asarray(batch_tokens, jnp.int32),
        "token_shard_pairs": jnp.asarray(batch_tokens * shards, jnp.float32),
    }


def _skips(guard: GuardState) -> dict[str, jax.Array]:
    """Of the last step, and of those up to it."""
    row = guard.skipped_in_a_row
    return {"skipped": (row > 0).astype(jnp.int32), "skipped_in_a_row": row}


def _traced_for(device: jax.Device, kernels: KernelConfig, step: Callable) -> Callable:
    """`step`, whose kernels are picked for a device of the mesh, which may not be here."""

    @functools.wraps(step)
    def traced(*args):
        with (
            sparse.target(device.platform, device.device_kind),
            sparse.preferring(kernels.implementation),
        ):
            return step(*args)

    return traced


def _sparse_gradients(state: TrainState, x_BD: jax.Array, spec: StepSpec, mesh: Mesh):
    inputs = (state.params, "tokens_since_fired", "replicated", "tokens")
    outputs = (state.params, "tokens_since_fired", "replicated")
    local = functools.partial(local_gradients, spec=spec)
    sharded = mesh_lib.per_device(local, mesh, inputs, outputs)
    return sharded(state.params, state.tokens_since_fired, state.variance, x_BD)


def _dense_gradients(state: TrainState, x_BD: jax.Array, spec: StepSpec, mesh: Mesh):
    x_BD, _, _ = spec.normalizer.apply(x_BD)
    shards = mesh_lib.shape_of(mesh).latent
    inputs = (state.params, state.tokens_since_fired, state.variance, x_BD)
    return dense_gradients(*inputs, spec.loss, shards)


def jit_step(step: Callable, abstract: TrainState, mesh: Mesh) -> Callable:
    """Compiles a step once: state sharded by the table and donated, tokens over the mesh."""
    shardings = mesh_lib.tree_shardings(mesh, abstract)
    return jax.jit(
        step,
        in_shardings=(shardings, mesh_lib.token_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
