"""The divergence guard: a step whose loss or gradient is bad changes nothing but the step count.

Bad is what is not finite, or a spike: far above what the newest accepted steps had. The judgement
is made on the device, before the update, from the loss and the norm of the gradient.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from saejax.types import GuardState

WINDOW = 128
"""Accepted steps that the state remembers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a step may not do.

    A loss or gradient that is not finite is skipped whatever these say.

    Attributes:
      window: accepted steps that a step is compared with, at most 128.
      spike_deviations: loss or gradient norm this many standard deviations above the window's mean
        is a spike; None skips only what is not finite.
      spike_ratio: and at least this many times the mean: where a curve is calm, its deviations
        are no measure (AuxK setting in, say).
      after_steps: accepted steps before spikes are looked for.
      rollback_after: skipped steps in a row after which training returns to the last checkpoint
        from before them; a second time from the same one is an error.
    """

    window: int = WINDOW
    spike_deviations: float | None = 6.0
    spike_ratio: float = 2.0
    after_steps: int = WINDOW
    rollback_after: int = 10

    def __post_init__(self):
        if not 2 <= self.window <= WINDOW:
            raise ValueError(f"window = {self.window} must lie in [2, {WINDOW}]")
        wide = self.spike_deviations
        if wide is not None and not 0 < wide < math.inf:
            raise ValueError(f"spike_deviations = {wide} must be positive, or None (no spikes)")
        if not 1 <= self.spike_ratio < math.inf:
            raise ValueError(f"spike_ratio = {self.spike_ratio} must be at least 1")
        if self.after_steps < 2:
            raise ValueError(f"after_steps = {self.after_steps} must be at least 2")
        if self.rollback_after < 1:
            raise ValueError(f"rollback_after = {self.rollback_after} must be at least 1")


def fresh() -> GuardState:
    """Nothing was accepted or skipped yet."""
    return GuardState(
        recent=jnp.zeros((2, WINDOW), jnp.float32),
        updates=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def judge(state: GuardState, loss: jax.Array, norm: jax.Array, config: GuardConfig) -> jax.Array:
    """Whether a step may update: bool, the same on every device.

    Args:
      state: of the steps before.
      loss: of the batch.
      norm: of the gradient.
      config: see there.
    """
    now_2 = _pair(loss, norm)
    accept = jnp.isfinite(now_2).all()
    if config.spike_deviations is None:
        return accept
    age_W = (state.updates - 1 - jnp.arange(WINDOW)) % WINDOW
    n = jnp.minimum(state.updates, config.window)
    inside_W = age_W < n
    n = jnp.maximum(n, 1).astype(jnp.float32)
    mean_2 = jnp.where(inside_W, state.recent, 0).sum(1) / n
    away_2W = jnp.where(inside_W, state.recent - mean_2[:, None], 0)
    deviation_2 = jnp.sqrt(jnp.square(away_2W).sum(1) / n)
    limit_2 = jnp.maximum(
        mean_2 + config.spike_deviations * deviation_2, config.spike_ratio * mean_2
    )
    # A mean of 0 (nothing left to learn) has no spikes: every rounding error would be one.
    spike_2 = (now_2 > limit_2) & (mean_2 > 0)
    judged = state.updates >= config.after_steps
    return accept & ~(judged & spike_2.any())


def record(state: GuardState, accept: jax.Array, loss: jax.Array, norm: jax.Array) -> GuardState:
    """The state after a step that was judged."""
    here_W = jnp.arange(WINDOW) == state.updates % WINDOW
    return GuardState(
        recent=jnp.where(accept & here_W, _pair(loss, norm)[:, None], state.recent),
        updates=state.updates + accept.astype(jnp.int32),
        skipped_in_a_row=jnp.where(accept, 0, state.skipped_in_a_row + 1),
    )


def all_finite(tree: Any) -> bool:
    """Whether every entry of every array is; waits for them."""
    return all(bool(jax.device_get(_finite(leaf))) for leaf in jax.tree.leaves(tree))


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _pair(loss: jax.Array, norm: jax.Array) -> jax.Array:
    return jnp.stack([loss.astype(jnp.float32), norm.astype(jnp.float32)])
