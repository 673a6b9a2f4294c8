"""Frozen pytrees that cross the walls between packages."""

import dataclasses
from typing import Any

import jax

Params = dict[str, jax.Array]
"""The autoencoder's four arrays: w_enc [L, D], w_dec [L, D], latent_bias [L], pre_bias [D]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents:
    """A sparse code and what decoding needs to return to the space of the input.

    Attributes:
      values: `[..., K]` float32; zero where fewer than K latents are active, and non-negative
        unless the model has no ReLU.
      indices: `[..., K]` int32 in [0, L); latents in descending order of pre-activation.
      offset: `[..., 1]`, what input normalisation subtracted (0 if nothing).
      scale: `[..., 1]`, what it divided by (1 if nothing).
    """

    values: jax.Array
    indices: jax.Array
    offset: jax.Array
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardState:
    """What steps are judged by, and the count of those that changed something.

    Attributes:
      recent: `[2, W]` float32, loss and gradient norm of the newest accepted steps; number i of
        them, from 0, lies at i mod W.
      updates: int32, accepted steps: updates of the parameters, and of Adam's and the EMA's counts.
      skipped_in_a_row: int32, steps skipped since the last accepted one.
    """

    recent: jax.Array
    updates: jax.Array
    skipped_in_a_row: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a training step reads and writes; saved whole in every checkpoint.

    Attributes:
      step: int32 scalar, steps done, skipped ones too: the position in the data and the schedule.
      params: float32 master parameters.
      opt_state: optax state; its leaves carry the names and shardings of `params`.
      ema: running average of `params` (without bias correction), or None.
      tokens_since_fired: `[L]` int32, saturating.
      variance: float32 scalar, E||x - E x||^2 of the normalised initial sample; the constant that
        turns squared error into normalised MSE (Gao et al. 2024, App. A.6).
      guard: see there.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None
    tokens_since_fired: jax.Array
    variance: jax.Array
    guard: GuardState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Sums and counts of one batch; ratios are taken on the host, in float64.

    Attributes:
      tokens: tokens in the batch.
      squared_error: sum over tokens of ||x - x_hat||^2, normalised space.
      multi_squared_error: the same for the 4k code of Multi-TopK; 0 when it is off.
      active: sum over tokens of the number of active (non-zero) latents.
      dead: latents dead after this batch was counted.
      auxk: normalised AuxK loss; 0 when nothing is dead.
      auxk_skipped: 1 if the AuxK term had no finite value and was replaced by 0.
      at_capacity: (token, latent shard) pairs where the shard offered all it may to the global
        top-k, all were kept, and it has more latents; 0 proves that the selection was exact.
      multi_at_capacity, auxk_at_capacity: the same for Multi-TopK and AuxK.
      reselected: (token, latent shard) pairs that a kernel's first pass did not settle, so that all
        their pre-activations were selected from; the selection is exact either way, but slower.
      token_shard_pairs: number of pairs, to divide by; float32.
      grad_norm: global norm of the gradient after projection, before clipping.
      learning_rate: the rate this update used.
      skipped: 1 if the guard left the update out.
      skipped_in_a_row: steps skipped up to this one, it included.
    """

    tokens: jax.Array
    squared_error: jax.Array
    multi_squared_error: jax.Array
    active: jax.Array
    dead: jax.Array
    auxk: jax.Array
    auxk_skipped: jax.Array
    at_capacity: jax.Array
    multi_at_capacity: jax.Array
    auxk_at_capacity: jax.Array
    reselected: jax.Array
    token_shard_pairs: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
