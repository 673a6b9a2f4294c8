"""What watches a training run: metrics, progress, non-finite stop."""

import json
import logging
import math
import pathlib
import time

import jax
import numpy as np

from saejax.types import StepMetrics

_LOG = logging.getLogger(__name__)


class Window:
    """Sums of the steps since the last record; ratios are taken once, in float64."""

    def __init__(self, variance: float):
        """`variance` turns squared error into normalised MSE."""
        self._variance = variance
        self._pending: tuple[int, StepMetrics] | None = None
        self._steps: list[StepMetrics] = []
        self._started = time.monotonic()

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of step `step`, still on the device; counts those of the one before.

        Raises:
          FloatingPointError: the loss of the step before is not finite.
        """
        self.settle()
        self._pending = (step, metrics)

    def settle(self) -> None:
        """Waits for the last step and counts it; raises FloatingPointError as `add` does."""
        if self._pending is not None:
            step, metrics = self._pending
            metrics = jax.device_get(metrics)
            check_finite(metrics, step)
            self._steps.append(metrics)
            self._pending = None

    def close(self, step: int, n_latents: int, tokens_total: int) -> dict[str, float]:
        """The record of the window, which starts anew.

        Raises:
          ValueError: the window is empty.
        """
        self.settle()
        if not self._steps:
            raise ValueError(f"no step to report at step {step}")
        total = jax.tree.map(lambda *leaves: np.sum(leaves, dtype=np.float64), *self._steps)
        last, seconds = self._steps[-1], time.monotonic() - self._started
        record = {
            "step": step,
            "tokens": tokens_total,
            "nmse": total.squared_error / (total.tokens * self._variance),
            "multi_nmse": total.multi_squared_error / (total.tokens * self._variance),
            "l0": total.active / total.tokens,
            "dead_fraction": float(last.dead) / n_latents,
            "auxk": total.auxk / len(self._steps),
            "auxk_skipped": total.auxk_skipped,
            "at_capacity": total.at_capacity / total.token_shard_pairs,
            "multi_at_capacity": total.multi_at_capacity / total.token_shard_pairs,
            "auxk_at_capacity": total.auxk_at_capacity / total.token_shard_pairs,
            "reselected": total.reselected / total.token_shard_pairs,
            "grad_norm": float(last.grad_norm),
            "learning_rate": float(last.learning_rate),
            "tokens_per_second": total.tokens / seconds,
        }
        self._steps, self._started = [], time.monotonic()
        return {name: float(value) for name, value in record.items()}


def check_finite(metrics: StepMetrics, step: int) -> None:
    """Stops a run whose loss or gradient is no number.

    Raises:
      FloatingPointError: naming the step, whose state is not saved.
    """
    for name in ("squared_error", "grad_norm"):
        value = float(getattr(metrics, name))
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} = {value} at step {step} must be finite; the activations hold a "
                f"non-finite value or training diverged: lower Optimizer.learning_rate or set "
                f"Optimizer.clip_norm, and train in another workdir"
            )


class MetricsWriter:
    """`metrics.jsonl` and TensorBoard events of one run."""

    def __init__(self, workdir: pathlib.Path, resume_step: int = 0):
        """Opens both; records after `resume_step`, of steps that will run again, are dropped."""
        from tensorboardX import SummaryWriter  # protobuf is slow to import; only runs need it

        self._path = workdir / "metrics.jsonl"
        kept = [r for r in read_metrics(self._path) if r["step"] <= resume_step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        partial = self._path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(self._path)
        self._events = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
        )

    def write(self, record: dict[str, float]) -> None:
        """Appends one record."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "tokens"):
                self._events.add_scalar(f"train/{name}", value, int(record["step"]))

    def close(self) -> None:
        """Flushes the events."""
        self._events.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`; none if it does not exist. A torn last line is ignored."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class CapacityWarning:
    """Says once, for each selection, that the shards' capacity cuts more than it may.

    Share by share: a shard at capacity offered all it may to the global top-k, all were kept, and
    it had more. The default capacity makes that rare where latents are spread evenly; the warning
    comes for the paper's bare rule, and where latents crowd into few shards.
    """

    def __init__(self, limits: dict[str, float]):
        """`limits`: name of a record's share at capacity -> what it may reach."""
        self._limits = dict(limits)

    def check(self, record: dict[str, float]) -> None:
        """Looks at one record."""
        for name, limit in list(self._limits.items()):
            if record[name] > limit:
                del self._limits[name]
                _LOG.warning(
                    "%s = %.2e at step %d, above %.1e: so many (token, latent shard) pairs may "
                    "have lost some of the exact top-k that the model may be another when it is "
                    "evaluated exactly; raise TopK.capacity_factor, give TopK.max_expected_loss = "
                    "1e-5 or less, or set TopK.capacity_factor = None for the exact selection",
                    name,
                    record[name],
                    record["step"],
                    limit,
                )


def log_progress(record: dict[str, float], steps: int, seconds_left: float) -> None:
    """The one progress line."""
    _LOG.info(
        "step %d/%d  NMSE %.4f  L0 %.1f  dead %.2f %%  %s tokens/s  ETA %s",
        record["step"],
        steps,
        record["nmse"],
        record["l0"],
        100 * record["dead_fraction"],
        f"{record['tokens_per_second']:,.0f}",
        format_seconds(seconds_left),
    )


def format_seconds(seconds: float) -> str:
    """`1h02m`, `3m05s` or `12s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
