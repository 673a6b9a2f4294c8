"""Optimizer: projection, clipping, Adam, unit norm, EMA (Gao et al. 2024, App. A.3-A.6)."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from saejax.model.init import unit_rows
from saejax.types import Params

# lr = 2e-4 at n = 2^14 and falling with sqrt(n): the optimum read off the paper's sweep.
_RULE_RATE = 2e-4
_RULE_LATENTS = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam as in the paper.

    Attributes:
      learning_rate: None is the paper's 1/sqrt(n) rule, 2e-4 / sqrt(n_latents / 2^14), found at
        batches of 131,072 tokens.
      warmup_steps: linear warm-up from 0 (0 in the paper).
      decay: 'constant' (the paper), or 'linear' or 'cosine' to 0 over the last part of training.
      decay_fraction: the share of all steps that decay takes.
      beta1, beta2, epsilon: Adam's. Epsilon is small because gradients are means over a large
        batch.
      clip_norm: clip the gradient to this global norm; None does not clip.
      project_decoder_gradient: remove each decoder row's gradient component along the row.
      unit_norm_decoder: renormalise decoder rows after every step.
      ema_decay: decay of the weights' running average, whose bias-corrected value is evaluated
        and exported; None keeps none.
    """

    learning_rate: float | None = None
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_fraction: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 6.25e-10
    clip_norm: float | None = None
    project_decoder_gradient: bool = True
    unit_norm_decoder: bool = True
    ema_decay: float | None = 0.999

    def __post_init__(self):
        def check(field, ok, allowed):
            if not ok:
                raise ValueError(f"{field} = {getattr(self, field)!r} must be {allowed}")

        rate, clip, ema = self.learning_rate, self.clip_norm, self.ema_decay
        check("learning_rate", rate is None or 0 < rate < math.inf, "positive, or None (rule)")
        check("warmup_steps", self.warmup_steps >= 0, "at least 0")
        check("decay", self.decay in ("constant", "linear", "cosine"), "constant, linear, cosine")
        check("decay_fraction", 0 < self.decay_fraction <= 1, "in (0, 1]")
        check("beta1", 0 <= self.beta1 < 1, "in [0, 1)")
        check("beta2", 0 <= self.beta2 < 1, "in [0, 1)")
        check("epsilon", 0 < self.epsilon < math.inf, "positive")
        check("clip_norm", clip is None or 0 < clip < math.inf, "positive, or None (no clipping)")
        check("ema_decay", ema is None or 0 <= ema < 1, "in [0, 1), or None (no average)")

    def resolve_learning_rate(self, n_latents: int) -> float:
        """The peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return _RULE_RATE / math.sqrt(n_latents / _RULE_LATENTS)

    def schedule(self, n_latents: int, steps: int) -> optax.Schedule:
        """Learning rate as a function of the steps already done."""
        peak = self.resolve_learning_rate(n_latents)
        decay_steps = max(round(steps * self.decay_fraction), 1)

        def rate(step):
            warm = jnp.minimum((step + 1) / (self.warmup_steps + 1), 1.0)
            left = jnp.clip((steps - step) / decay_steps, 0.0, 1.0)
            shape = {
                "constant": 1.0,
                "linear": left,
                "cosine": 0.5 - 0.5 * jnp.cos(jnp.pi * left),
            }[self.decay]
            return peak * warm * shape

        return rate

    def transformation(self, n_latents: int, steps: int) -> optax.GradientTransformation:
        """Clipping and Adam; projection comes before it, unit norm after."""
        clip = optax.identity()
        if self.clip_norm is not None:
            clip = optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(
            clip,
            optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.epsilon),
            optax.scale_by_learning_rate(self.schedule(n_latents, steps)),
        )


def project_decoder_gradient(gradients: Params, params: Params) -> Params:
    """Removes from each decoder row's gradient its component along the (unit) row."""
    w_LD, g_LD = params["w_dec"], gradients["w_dec"]
    unit_LD = unit_rows(w_LD)
    along_L1 = (g_LD * unit_LD).sum(-1, keepdims=True)
    return gradients | {"w_dec": g_LD - along_L1 * unit_LD}


def renormalize_decoder(params: Params) -> Params:
    """Scales decoder rows to unit norm."""
    return params | {"w_dec": unit_rows(params["w_dec"])}


def update_ema(ema: Params, params: Params, decay: float) -> Params:
    """`decay * ema + (1 - decay) * params`, biased towards its zero start."""
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)


def corrected_ema(ema: Params, decay: float, updates: int) -> Params:
    """The average without the pull of its zero start, as Adam corrects its moments.

    Raises:
      ValueError: no step has been averaged yet.
    """
    if updates < 1:
        raise ValueError(f"updates = {updates}: no weights have been averaged yet")
    return jax.tree.map(lambda a: a / (1 - decay**updates), ema)
