"""The update of the parameters: projection, clipping, Adam, unit norm, EMA, in that order.

A step that the guard does not accept leaves all of it, and the dead counters, bit for bit.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax.model import sparse
from saejax.train import guard, optim
from saejax.types import GuardState, Params, TrainState

_MATRICES = ("w_enc", "w_dec")
# Its sums over shards are the compiler's own collectives: they have the plan's name by this scope.
_NORM = "gradient norm"


class Judged(NamedTuple):
    """What the guard judges a step by, besides its gradient.

    Attributes:
      loss: of the batch.
      config: of the guard.
    """

    loss: jax.Array
    config: guard.GuardConfig

    def accept(self, state: TrainState, squared_norm: jax.Array) -> tuple[jax.Array, GuardState]:
        """Whether to update, and the guard's next state."""
        norm = jnp.sqrt(squared_norm)
        accept = guard.judge(state.guard, self.loss, norm, self.config)
        return accept, guard.record(state.guard, accept, self.loss, norm)


def apply_gradients(
    state: TrainState,
    gradients: Params,
    since_L: jax.Array,
    judged: Judged,
    learning_rate: jax.Array,
    optimizer: optim.OptimizerConfig,
    mesh: Mesh,
) -> tuple[TrainState, jax.Array]:
    """The state after one update, and the gradient's norm, projected but not clipped.

    Each matrix takes one pass over its rows; what `optimizer.transformation` does, it does too.

    Args:
      state: before the step.
      gradients: of the batch.
      since_L: dead counters after the batch.
      judged: see there.
      learning_rate: of this step.
      optimizer, mesh: see there.
    """
    squared, scale = None, jnp.ones((), learning_rate.dtype)
    if optimizer.clip_norm is not None:  # its size must be known before anything is updated
        squared = _squared_norm(_projected(gradients, state.params, optimizer))
        scale = jnp.minimum(1, optimizer.clip_norm / jnp.sqrt(squared))
    # Of the raw gradient where no other is known yet: one read of it, not two of the decoder's.
    seen = _squared_norm(gradients) if squared is None else squared
    accept, judged_state = judged.accept(state, seen)
    scalars = sparse.RowScalars(learning_rate, state.guard.updates + 1, scale, accept)
    moments = {name: optax.tree.get(state.opt_state, name) for name in ("mu", "nu")}
    updated = {}
    for name in gradients:
        ema = None if state.ema is None else state.ema[name]
        arrays = (state.params[name], gradients[name], moments["mu"][name], moments["nu"][name])
        update = _update_matrix if name in _MATRICES else _update_vector
        updated[name] = update(name, arrays, ema, scalars, optimizer, mesh)

    def collected(field):
        return {name: getattr(updated[name], field) for name in state.params}

    if squared is None:
        squared = _summed(rows.squared_norm_L for rows in updated.values())
    opt_state = optax.tree.set(
        state.opt_state,
        mu=collected("mu_LD"),
        nu=collected("nu_LD"),
        count=judged_state.updates,
    )
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=collected("w_LD"),
        opt_state=_schedule_at(opt_state, state.step + 1),
        ema=None if state.ema is None else collected("ema_LD"),
        tokens_since_fired=jnp.where(accept, since_L, state.tokens_since_fired),
        guard=judged_state,
    )
    return state, jnp.sqrt(squared)


def apply_by_optax(
    state: TrainState,
    gradients: Params,
    since_L: jax.Array,
    judged: Judged,
    tx: optax.GradientTransformation,
    optimizer: optim.OptimizerConfig,
) -> tuple[TrainState, jax.Array]:
    """`apply_gradients`, array by array as optax has it: what the other is checked against."""
    raw = optax.tree.norm(gradients, squared=True)
    if optimizer.project_decoder_gradient:
        gradients = optim.project_decoder_gradient(gradients, state.params)
    norm = optax.tree.norm(gradients)
    seen = raw if optimizer.clip_norm is None else jnp.square(norm)
    accept, judged_state = judged.accept(state, seen)
    updates, opt_state = tx.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if optimizer.unit_norm_decoder:
        params = optim.renormalize_decoder(params)
    ema = state.ema
    if ema is not None:
        ema = optim.update_ema(ema, params, optimizer.ema_decay)
    new, old = (
        (params, opt_state, ema, since_L),
        (state.params, state.opt_state, state.ema, state.tokens_since_fired),
    )
    params, opt_state, ema, since_L = jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=_schedule_at(opt_state, state.step + 1),
        ema=ema,
        tokens_since_fired=since_L,
        guard=judged_state,
    )
    return state, norm


def _schedule_at(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The optimizer's state with its schedule at a step: skipped steps pass, too."""

    def of_schedule(path, value) -> bool:
        del value
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    return optax.tree.set(opt_state, of_schedule, count=step)


def _settings(name: str, optimizer: optim.OptimizerConfig) -> sparse.RowSettings:
    decoder = name == "w_dec"
    return sparse.RowSettings(
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        ema_decay=optimizer.ema_decay,
        project=decoder and optimizer.project_decoder_gradient,
        unit_norm=decoder and optimizer.unit_norm_decoder,
    )


def _update_matrix(name, arrays, ema, scalars, optimizer, mesh) -> sparse.RowUpdated:
    """Every device updates the rows it holds."""
    settings = _settings(name, optimizer)
    trees = (name,) * (4 if ema is None else 5)

    def update(scalars, *rows):
        w, g, mu, nu, *average = rows
        average = average[0] if average else None
        done = sparse.row_update(w, g, mu, nu, average, scalars, settings=settings)
        return tuple(array for array in done if array is not None)

    outputs = (*trees[1:], "latent_bias")
    rows = mesh_lib.per_device(update, mesh, ("replicated", *trees), outputs)
    *done, squared_L = rows(scalars, *arrays, *(() if ema is None else (ema,)))
    average = done[3] if ema is not None else None
    return sparse.RowUpdated(*done[:3], average, None, squared_L)


def _update_vector(name, arrays, ema, scalars, optimizer, mesh) -> sparse.RowUpdated:
    """A vector is a matrix of one row; elementwise work needs no kernel."""
    del mesh
    w, g, mu, nu, average = (None if a is None else a[None] for a in (*arrays, ema))
    done = sparse.row_update(
        w,
        g,
        mu,
        nu,
        average,
        scalars._replace(accept=None),
        settings=_settings(name, optimizer),
        implementation="xla",
    )
    new, old = (done.w_LD, done.mu_LD, done.nu_LD, done.ema_LD), (w, mu, nu, average)
    kept = jax.tree.map(lambda a, b: jnp.where(scalars.accept, a, b), new, old)
    return jax.tree.map(lambda array: array[0], sparse.RowUpdated(*kept, *done[4:]))


def _projected(gradients: Params, params: Params, optimizer: optim.OptimizerConfig) -> Params:
    if not optimizer.project_decoder_gradient:
        return gradients
    return optim.project_decoder_gradient(gradients, params)


@jax.named_scope(_NORM)
def _squared_norm(gradients: Params) -> jax.Array:
    return optax.tree.norm(gradients, squared=True)


@jax.named_scope(_NORM)
def _summed(parts: Iterable[jax.Array]) -> jax.Array:
    return sum(part.sum() for part in parts)
