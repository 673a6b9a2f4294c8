"""The step as it is usually written: dense codes and autodiff, to compare with."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from pallas_kernels.bench.inputs import Inputs
from pallas_kernels.bench.steps import (
    AUXK,
    DEAD_TOKENS,
    RATE,
    memory_of,
    planted,
)
from pallas_kernels.bench.timing import Run
from pallas_kernels.shapes import Shape

_SETTINGS = pk.RowSettings(
    beta1=0.9, beta2=0.999, epsilon=6.25e-10, ema_decay=0.999, project=True, unit_norm=True
)


def bytes_needed(shape: Shape) -> int:
    """About what the dense step needs: four `[B, L]` arrays and the training state."""
    return 4 * (4 * shape.tokens * shape.n + 12 * shape.n * shape.d)


def memory_limit() -> int:
    """Bytes of the first device's memory, or of the machine's."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def dense(shape: Shape, pool: Sequence[Inputs], dtype: str) -> tuple[Run, dict[str, int]]:
    """The library's loss by dense products and autodiff, with the same optimizer; and its memory.

    AuxK is in the program, but nothing is dead.
    """
    step = jax.jit(functools.partial(train_step, shape, jnp.dtype(dtype)), donate_argnums=0)
    params = planted(pool[0])
    zeros = jax.tree.map(jnp.zeros_like, params)
    held = [(params, zeros, jax.tree.map(jnp.copy, zeros), jax.tree.map(jnp.copy, zeros))]
    rest = (jnp.int32(1), jnp.zeros(shape.n, jnp.int32))
    compiled = step.lower(held[0], *rest, pool[0].x_BD).compile()

    def call(i: int):
        held[0], *sums = compiled(held[0], *rest, pool[i % len(pool)].x_BD)
        return held[0], sums

    return Run(call), memory_of(compiled)


def train_step(shape: Shape, dtype: jnp.dtype, state, count, since_L, x_BD):
    """One step with the defaults of the library's: input of unit norm, Adam, unit-norm decoder.

    Args:
      shape: sizes.
      dtype: of the multiplications.
      state: parameters, Adam's two moments and the average, each a dict like `steps.planted`.
      count: int32, 1 for the first step.
      since_L: int32, tokens since each latent fired.
      x_BD: tokens.

    Returns:
      The new state, the loss, and the new counters.
    """
    params, mu, nu, ema = state
    x_BD = x_BD.astype(jnp.float32)
    x_BD = x_BD - x_BD.mean(1, keepdims=True)
    x_BD = x_BD / jnp.sqrt(jnp.square(x_BD).sum(1, keepdims=True))
    loss_of = functools.partial(_loss, shape, dtype)
    (loss, fired_L), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, since_L, x_BD)
    scalars = pk.RowScalars(jnp.float32(RATE), count, jnp.float32(1))
    plain = dataclasses.replace(_SETTINGS, project=False, unit_norm=False)
    new = {}
    for name, w in params.items():
        arrays = (w, gradients[name], mu[name], nu[name], ema[name])
        rows = [a.reshape(len(a), -1) if a.ndim > 1 else a[None] for a in arrays]
        settings = _SETTINGS if name == "w_dec" else plain
        done = pk.row_update(*rows, scalars, settings=settings, implementation="xla")
        new[name] = [a.reshape(w.shape) for a in (done.w_LD, done.mu_LD, done.nu_LD, done.ema_LD)]
    state = tuple({name: parts[i] for name, parts in new.items()} for i in range(4))
    return state, loss, jnp.where(fired_L, 0, since_L + shape.tokens)


def _loss(shape: Shape, dtype: jnp.dtype, params, since_L, x_BD):
    """Normalised squared error plus AuxK over dead latents, every code a `[B, L]` array."""

    def matmul(a, b):
        return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)

    def code(h_BL, k: int):
        values_BK, indices_BK = jax.lax.top_k(h_BL, k)
        values_BK = jnp.maximum(jnp.where(values_BK > -jnp.inf, values_BK, 0), 0)
        tokens_B1 = jnp.arange(len(h_BL))[:, None]
        return jnp.zeros_like(h_BL).at[tokens_B1, indices_BK].set(values_BK)

    h_BL = matmul(x_BD - params["pre_bias"], params["w_enc"].T) + params["latent_bias"]
    z_BL = code(h_BL, shape.k)
    e_BD = x_BD - matmul(z_BL, params["w_dec"]) - params["pre_bias"]
    fired_L = (jax.lax.stop_gradient(z_BL) != 0).any(0)
    dead_L = jnp.where(fired_L, 0, since_L + shape.tokens) >= DEAD_TOKENS

    def auxk():
        rest_BD = jax.lax.stop_gradient(e_BD)
        dead_BL = code(jnp.where(dead_L, h_BL, -jnp.inf), min(shape.k_aux, shape.n))
        error = jnp.square(rest_BD - matmul(dead_BL, params["w_dec"])).sum()
        return error / jnp.square(rest_BD - rest_BD.mean(0)).sum()

    none = jnp.zeros(())
    extra = jax.lax.cond(dead_L.any(), auxk, lambda: none)
    return jnp.square(e_BD).sum() / shape.tokens + AUXK * extra, fired_L
