"""Synthetic activations with known features: a sparse superposition of unit directions.

Feature i is active with probability p_i, which falls as a power law; an active feature has a
magnitude `offset + Exp(scale)`; a row is the sum of magnitude times direction, plus Gaussian noise.
Because the features are known, an autoencoder's dictionary can be judged (`evals.recovery`).
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from saejax.data.feed import Ranges, check_ranges, take

# A family of keys of its own: fold_in(key, 0) is split(key)[0], which an initialiser of the same
# seed draws its weights from, and a dictionary that starts as the truth recovers it.
_FAMILY = 0x5AE_F00D
_DIRECTIONS, _TRAIN, _HELD_OUT = 0, 1, 2
_HELD_OUT_BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """A superposition of known features.

    Attributes:
      features: number of true features, F.
      d_model: width of a row, D.
      mean_l0: mean number of active features a row.
      exponent: p_i is proportional to i ** -exponent, up to `max_probability`.
      max_probability: no feature is active more often.
      magnitude_offset: smallest magnitude of an active feature.
      magnitude_scale: mean of the exponential part of the magnitude.
      noise: standard deviation of the Gaussian noise in each coordinate.
      rows: rows that count as one epoch; the stream itself never repeats.
      held_out_rows: rows held out for evaluation.
      seed: fixes directions and rows.
    """

    features: int = 512
    d_model: int = 64
    mean_l0: float = 4.0
    exponent: float = 1.0
    max_probability: float = 0.5
    magnitude_offset: float = 0.5
    magnitude_scale: float = 0.5
    noise: float = 0.01
    rows: int = 1_000_000
    held_out_rows: int = 32_768
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("features", "d_model", "rows", "held_out_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"Synthetic.{name} = {getattr(self, name)}: must be at least 1.")
        for name in ("exponent", "magnitude_offset", "magnitude_scale", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"Synthetic.{name} = {getattr(self, name)}: must be finite and 0 or more."
                )
        if self.magnitude_offset + self.magnitude_scale == 0:
            raise ValueError("Synthetic.magnitude_offset and .magnitude_scale: not both 0.")
        if not 0 < self.max_probability <= 1:
            raise ValueError(
                f"Synthetic.max_probability = {self.max_probability}: must be in (0, 1]."
            )
        if not 0 < self.mean_l0 <= self.max_probability * self.features:
            raise ValueError(
                f"Synthetic.mean_l0 = {self.mean_l0}: must be above 0 and at most max_probability "
                f"* features = {self.max_probability * self.features}."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"Synthetic.seed = {self.seed}: must be in [0, 2**32).")


class Synthetic:
    """Batches of synthetic rows, with the interface of `Loader`, and their ground truth.

    Attributes:
      cfg: the configuration.
      d_model: width of the rows.
      batch_size: rows of a global batch, B.
      wait_seconds: 0; nothing is read.
      features: float32 [F, D], the true unit directions.
      probabilities: float64 [F], how often each is active; falling.
    """

    def __init__(self, cfg: SyntheticConfig, batch_size: int) -> None:
        """Draws the features; ValueError for an empty batch."""
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1.")
        self.cfg = cfg
        self.d_model = cfg.d_model
        self.batch_size = batch_size
        self.wait_seconds = 0.0
        self.probabilities = feature_probabilities(cfg)
        key = _key(cfg, _DIRECTIONS)
        directions_FD = np.asarray(jax.random.normal(key, (cfg.features, cfg.d_model)), np.float64)
        norms_F1 = np.linalg.norm(directions_FD, axis=1, keepdims=True)
        self.features = (directions_FD / norms_F1).astype(np.float32)

    @property
    def tokens_per_epoch(self) -> int:
        """`cfg.rows`."""
        return self.cfg.rows

    def batch(self, step: int, ranges: Ranges | None = None) -> np.ndarray:
        """The rows `ranges` of batch `step`, all by default: float32 [b, D]; pure in `step`."""
        # The whole batch is drawn: a product of fewer rows may round otherwise.
        rows = self._draw(_TRAIN, step, self.batch_size)[0]
        return take(rows, check_ranges(ranges, self.batch_size))

    def magnitudes(self, step: int, ranges: Ranges | None = None) -> np.ndarray:
        """The true magnitudes of `batch(step, ranges)`, float32 [b, F]; 0 where inactive."""
        magnitudes = self._draw(_TRAIN, step, self.batch_size)[1]
        return take(magnitudes, check_ranges(ranges, self.batch_size))

    def iterate(
        self, start_step: int = 0, stop_step: int | None = None, ranges: Ranges | None = None
    ) -> Iterator[np.ndarray]:
        """Batches from `start_step` on; without end unless `stop_step` is given."""
        step = start_step
        while stop_step is None or step < stop_step:
            yield self.batch(step, ranges)
            step += 1

    def sample_rows(self, n: int) -> np.ndarray:
        """float32 [n, D]: the first n rows of the global stream, in every process alike."""
        if n < 1:
            raise ValueError(f"sample of {n} rows: ask for at least 1.")
        steps = range(-(-n // self.batch_size))
        rows = [self._draw(_TRAIN, step, self.batch_size)[0] for step in steps]
        return np.concatenate(rows)[:n]

    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows that no batch holds, float32 [N, D], and their magnitudes, float32 [N, F]."""
        blocks = range(-(-self.cfg.held_out_rows // _HELD_OUT_BLOCK))
        rows, magnitudes = zip(
            *(self._draw(_HELD_OUT, block, _HELD_OUT_BLOCK) for block in blocks), strict=True
        )
        n = self.cfg.held_out_rows
        return np.concatenate(rows)[:n], np.concatenate(magnitudes)[:n]

    def _draw(self, stream: int, index: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        if index < 0:
            raise ValueError(f"step = {index}: must be 0 or more.")
        probabilities_F = self.probabilities.astype(np.float32)
        arguments = (self.features, probabilities_F, np.int32(stream), np.int32(index))
        return jax.device_get(_draw(self.cfg, n, *jax.device_put(arguments)))


def feature_probabilities(cfg: SyntheticConfig) -> np.ndarray:
    """float64 [F], falling: min(c * i ** -exponent, max_probability) with sum `mean_l0`."""
    weights_F = np.arange(1, cfg.features + 1, dtype=np.float64) ** -cfg.exponent
    low, high = 0.0, cfg.max_probability / weights_F[-1]
    for _ in range(200):  # bisection for c: the sum grows with c
        middle = (low + high) / 2
        below = np.minimum(middle * weights_F, cfg.max_probability).sum() < cfg.mean_l0
        low, high = (middle, high) if below else (low, middle)
    return np.minimum(high * weights_F, cfg.max_probability)


def _key(cfg: SyntheticConfig, stream: int | jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), _FAMILY), stream)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(
    cfg: SyntheticConfig,
    n: int,
    features_FD: jax.Array,
    probabilities_F: jax.Array,
    stream: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(_key(cfg, stream), index)
    active_key, size_key, noise_key = jax.random.split(key, 3)
    shape = (n, cfg.features)
    active_BF = jax.random.uniform(active_key, shape) < probabilities_F[None]
    sizes_BF = cfg.magnitude_offset + cfg.magnitude_scale * jax.random.exponential(size_key, shape)
    magnitudes_BF = jnp.where(active_BF, sizes_BF, 0.0)
    noise_BD = cfg.noise * jax.random.normal(noise_key, (n, cfg.d_model))
    rows_BD = jnp.dot(magnitudes_BF, features_FD, precision=jax.lax.Precision.HIGHEST) + noise_BD
    return rows_BD, magnitudes_BF
