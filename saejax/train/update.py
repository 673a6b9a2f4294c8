"""The update of the parameters: projection, clipping, Adam, unit norm, EMA, in that order."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax.model import sparse
from saejax.train import optim
from saejax.types import Params, TrainState

_MATRICES = ("w_enc", "w_dec")


def apply_gradients(
    state: TrainState,
    gradients: Params,
    learning_rate: jax.Array,
    optimizer: optim.OptimizerConfig,
    mesh: Mesh,
) -> tuple[TrainState, jax.Array]:
    """The state after one update, and the gradient's norm, projected but not clipped.

    Each matrix takes one pass over its rows; what `optimizer.transformation` does, it does too.
    """
    squared, scale = None, jnp.ones((), learning_rate.dtype)
    if optimizer.clip_norm is not None:  # its size must be known before anything is updated
        squared = _squared_norm(gradients, state.params, optimizer)
        scale = jnp.minimum(1, optimizer.clip_norm / jnp.sqrt(squared))
    scalars = sparse.RowScalars(learning_rate, state.step + 1, scale)
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
        squared = sum(rows.squared_norm_L.sum() for rows in updated.values())
    opt_state = optax.tree.set(
        state.opt_state, mu=collected("mu_LD"), nu=collected("nu_LD"), count=state.step + 1
    )
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=collected("w_LD"),
        opt_state=opt_state,
        ema=None if state.ema is None else collected("ema_LD"),
    )
    return state, jnp.sqrt(squared)


def apply_by_optax(
    state: TrainState,
    gradients: Params,
    tx: optax.GradientTransformation,
    optimizer: optim.OptimizerConfig,
) -> tuple[TrainState, jax.Array]:
    """`apply_gradients`, array by array as optax has it: what the other is checked against."""
    if optimizer.project_decoder_gradient:
        gradients = optim.project_decoder_gradient(gradients, state.params)
    norm = optax.tree.norm(gradients)
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
    return state, norm


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
    rows = (array[None] for array in arrays)
    done = sparse.row_update(
        *rows,
        None if ema is None else ema[None],
        scalars,
        settings=_settings(name, optimizer),
        implementation="xla",
    )
    return jax.tree.map(lambda array: array[0], done)


def _squared_norm(gradients: Params, params: Params, optimizer: optim.OptimizerConfig):
    if optimizer.project_decoder_gradient:
        gradients = optim.project_decoder_gradient(gradients, params)
    return optax.tree.norm(gradients, squared=True)
