"""The whole recipe in plain numpy float64, written from the paper, gradients derived by hand.

Nothing here imports jax or the code under test. Gao et al. 2024: sec. 2 (model, normalisation),
5.3 (Multi-TopK), App. A.2 (AuxK), A.3 (Adam, projected decoder gradient, clipping), A.5 (EMA),
A.6 (the main error over a constant, AuxK's over each batch's own spread).
"""

import dataclasses
import math

import numpy as np

NAMES = ("w_enc", "w_dec", "latent_bias", "pre_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a run; the attributes are the paper's symbols."""

    k: int
    k_aux: int
    variance: float
    learning_rate: float
    steps: int
    k_multi: int = 0
    multi: float = 0.0
    alpha: float = 1 / 32
    dead_tokens: int = 10_000_000
    warmup_steps: int = 0
    cosine_share: float | None = None
    clip: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 6.25e-10
    ema: float = 0.999


class Run:
    """Parameters, Adam moments, EMA and dead counters of one run, moved on by `step`."""

    def __init__(self, recipe: Recipe, params: dict[str, np.ndarray]):
        self.recipe = recipe
        self.params = {name: np.array(params[name], np.float64) for name in NAMES}
        self.mu = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.nu = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.ema = {name: np.zeros_like(p) for name, p in self.params.items()}
        self.silent_tokens = np.zeros(len(self.params["w_enc"]), np.int64)
        self.steps_done = 0

    def step(self, raw: np.ndarray, learning_rate: float | None = None) -> dict[str, float]:
        """One update on raw activations `[B, D]`, at the schedule's rate unless one is given.

        Returns the metrics; `learning_rate` among them is always the schedule's own.
        """
        r, p = self.recipe, self.params
        centred = raw - raw.mean(1, keepdims=True)
        x = centred / np.sqrt((centred**2).sum(1, keepdims=True))
        h = (x - p["pre_bias"]) @ p["w_enc"].T + p["latent_bias"]
        gradients = {name: np.zeros_like(array) for name, array in p.items()}

        z = relu_top_k(h, r.k)
        residual = x - (z @ p["w_dec"] + p["pre_bias"])
        weight = 1 / (len(x) * r.variance)
        add_reconstruction_gradient(gradients, p, x, z, residual, weight)
        metrics = {"squared_error": (residual**2).sum(), "active": (z > 0).sum()}
        metrics["multi_squared_error"] = 0.0
        if r.multi:
            wide = relu_top_k(h, r.k_multi)
            wide_residual = x - (wide @ p["w_dec"] + p["pre_bias"])
            add_reconstruction_gradient(gradients, p, x, wide, wide_residual, r.multi * weight)
            metrics["multi_squared_error"] = (wide_residual**2).sum()

        self.silent_tokens += len(x)
        self.silent_tokens[(z > 0).any(0)] = 0
        dead = self.silent_tokens >= r.dead_tokens
        metrics["dead"] = dead.sum()
        metrics["auxk"] = self.add_auxk(gradients, x, h, residual, dead) if dead.any() else 0.0

        metrics |= self.update(gradients, learning_rate)
        return metrics

    def add_auxk(self, gradients, x, h, residual, dead) -> float:
        """Adds alpha * L_aux's gradient; the residual is a constant here, and holds no pre_bias."""
        r, p = self.recipe, self.params
        z = relu_top_k(np.where(dead, h, -np.inf), r.k_aux)
        error = residual - z @ p["w_dec"]
        spread = ((residual - residual.mean(0)) ** 2).sum()
        d_out = -2 * r.alpha / spread * error
        gradients["w_dec"] += z.T @ d_out
        add_encoder_gradient(gradients, p, x, (d_out @ p["w_dec"].T) * (z > 0))
        return (error**2).sum() / spread

    def update(self, gradients, given_rate: float | None) -> dict[str, float]:
        """Projection, clipping, Adam, unit norm, EMA; returns norm and the schedule's rate."""
        r, p = self.recipe, self.params
        for row, g in zip(p["w_dec"], gradients["w_dec"]):
            g -= (g @ row) / (row @ row) * row
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        shrink = min(1.0, r.clip / norm) if r.clip else 1.0
        scheduled = self.learning_rate()
        rate = scheduled if given_rate is None else given_rate
        self.steps_done += 1
        t = self.steps_done
        for name in NAMES:
            g = gradients[name] * shrink
            self.mu[name] = r.beta1 * self.mu[name] + (1 - r.beta1) * g
            self.nu[name] = r.beta2 * self.nu[name] + (1 - r.beta2) * g**2
            mean, square = self.mu[name] / (1 - r.beta1**t), self.nu[name] / (1 - r.beta2**t)
            p[name] = p[name] - rate * mean / (np.sqrt(square) + r.epsilon)
        p["w_dec"] = p["w_dec"] / np.linalg.norm(p["w_dec"], axis=1, keepdims=True)
        for name in NAMES:
            self.ema[name] = r.ema * self.ema[name] + (1 - r.ema) * p[name]
        return {"grad_norm": norm, "learning_rate": scheduled}

    def learning_rate(self) -> float:
        """Rate of the next step: linear warm-up, then constant, or a cosine to 0 at the end."""
        r, done = self.recipe, self.steps_done
        rate = r.learning_rate * min(1.0, (done + 1) / (r.warmup_steps + 1))
        if r.cosine_share is not None:
            left = min(1.0, (r.steps - done) / max(round(r.cosine_share * r.steps), 1))
            rate *= (1 - math.cos(math.pi * left)) / 2
        return rate

    def corrected_ema(self) -> dict[str, np.ndarray]:
        """The average without the pull of its zero start."""
        return {name: e / (1 - self.recipe.ema**self.steps_done) for name, e in self.ema.items()}


def relu_top_k(h: np.ndarray, k: int) -> np.ndarray:
    """Dense code: the k largest of every row (ties to the lowest index) where positive."""
    z = np.zeros_like(h)
    for row, out in zip(h, z):
        kept = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        out[kept] = np.maximum(row[kept], 0)
    return z


def add_reconstruction_gradient(gradients, p, x, z, residual, weight) -> None:
    """Gradient of `weight * ||residual||^2` with residual = x - z W_dec - b_pre."""
    d_out = -2 * weight * residual
    gradients["w_dec"] += z.T @ d_out
    gradients["pre_bias"] += d_out.sum(0)
    add_encoder_gradient(gradients, p, x, (d_out @ p["w_dec"].T) * (z > 0))


def add_encoder_gradient(gradients, p, x, d_h) -> None:
    """Chain rule through h = W_enc (x - b_pre) + b_latent."""
    gradients["w_enc"] += d_h.T @ (x - p["pre_bias"])
    gradients["latent_bias"] += d_h.sum(0)
    gradients["pre_bias"] -= d_h.sum(0) @ p["w_enc"]
