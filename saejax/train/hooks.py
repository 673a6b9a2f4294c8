"""What watches a training run: metrics, skipped steps, progress."""

import contextlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from saejax.types import StepMetrics

_LOG = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """So many steps in a row were skipped that training must go back.

    Attributes:
      first, last: the skipped steps.
      loss, grad_norm: of the last one; the loss is the normalised MSE.
    """

    @property
    def finite(self) -> bool:
        """Whether the numbers of the last step are."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __init__(self, first: int, last: int, loss: float, grad_norm: float):
        """Describes them in the message, with their batches: step s reads batch s - 1."""
        self.first, self.last = first, last
        self.loss, self.grad_norm = loss, grad_norm
        super().__init__(
            f"steps {first} to {last} were skipped (batches {first - 1} to {last - 1}; at the last "
            f"one loss = {loss:.6g}, gradient norm = {grad_norm:.6g})"
        )


class Window:
    """Sums of the accepted steps since the last record; ratios are taken once, in float64.

    Attributes:
      in_a_row: steps skipped since the last accepted one, as far as they were counted.
    """

    def __init__(
        self,
        variance: float,
        state: Mapping[str, Any] | None = None,
        *,
        most_in_a_row: int | None = None,
    ):
        """Begins a window, or goes on with one.

        Args:
          variance: turns squared error into normalised MSE.
          state: of the window to go on with.
          most_in_a_row: skipped steps at which training must go back; None is never.
        """
        begin = {"seconds": 0.0, "waited": 0.0, "skipped": 0, "in_a_row": 0, "steps": []}
        state = begin if state is None else state
        self._variance = variance
        self._most = most_in_a_row
        self._skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._bad = (math.nan, math.nan)  # loss and gradient norm of the last skipped step
        self._pending: tuple[int, StepMetrics] | None = None
        self._steps = [StepMetrics(**step) for step in state["steps"]]
        self._started = time.monotonic() - state["seconds"]
        self._waited = state["waited"]

    def state(self) -> dict[str, Any]:
        """What is summed so far, exactly, as JSON; to be called after `settle`."""
        return {
            "seconds": time.monotonic() - self._started,
            "waited": self._waited,
            "skipped": self._skipped,
            "in_a_row": self.in_a_row,
            "steps": [
                {name: np.asarray(value).item() for name, value in vars(step).items()}
                for step in self._steps
            ],
        }

    def wait(self, seconds: float) -> None:
        """Counts time in which the loop waited for activations."""
        self._waited += seconds

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of step `step`, still on the device; counts those of the one before.

        Raises:
          DivergedError: too many steps in a row were skipped.
        """
        self.settle()
        self._pending = (step, metrics)

    def diverged(self, step: int) -> DivergedError:
        """What to raise after `step`, the last of those skipped in a row."""
        return DivergedError(step - max(self.in_a_row, 1) + 1, step, *self._bad)

    def settle(self) -> None:
        """Waits for the last step and counts it; raises DivergedError as `add` does."""
        if self._pending is not None:
            (step, metrics), self._pending = self._pending, None
            metrics = jax.device_get(metrics)
            self.in_a_row = int(metrics.skipped_in_a_row)
            if metrics.skipped:
                self._skip(step, metrics)
            else:
                self._steps.append(metrics)

    def _skip(self, step: int, metrics: StepMetrics) -> None:
        self._skipped += 1
        loss = float(metrics.squared_error) / (float(metrics.tokens) * self._variance)
        norm = float(metrics.grad_norm)
        _LOG.warning(
            "step %d (batch %d) skipped, its loss or gradient being %s: loss = %.6g, gradient "
            "norm = %.6g; %d in a row",
            step,
            step - 1,
            "a spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite",
            loss,
            norm,
            self.in_a_row,
        )
        self._bad = loss, norm
        if self._most is not None and self.in_a_row >= self._most:
            raise self.diverged(step)

    def close(self, step: int, n_latents: int, tokens_total: int) -> dict[str, float] | None:
        """The record of the window, which starts anew; None, and it goes on, if all was skipped.

        Raises:
          ValueError: the window is empty.
        """
        self.settle()
        if not self._steps and self._skipped:
            return None
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
            "skipped": self._skipped,
            "skipped_in_a_row": self.in_a_row,
            "tokens_per_second": total.tokens / seconds,
            "wait_share": self._waited / seconds,
        }
        self._steps, self._started, self._waited = [], time.monotonic(), 0.0
        self._skipped = 0
        return {name: float(value) for name, value in record.items()}


class MetricsWriter:
    """`metrics.jsonl` and TensorBoard events of one run.

    Written and flushed by the thread that trains: one of the library's own that meets a full disk
    ends, and whoever hands it the next event waits for ever.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int = 0):
        """Opens both; records after `resume_step`, of steps that will run again, are dropped.

        Raises:
          OSError: as of `write`.
        """
        from tensorboardX.event_file_writer import EventsWriter  # protobuf is slow to import
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._path, self._folder = workdir / "metrics.jsonl", workdir / "tensorboard"
        kept = [r for r in read_metrics(self._path) if r["step"] <= resume_step]
        with _written(self._path):
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
            partial.replace(self._path)
        with _written(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            # A name of its own: a rollback may open the next one within the same second.
            suffix = f".{os.getpid()}.{resume_step}"
            self._events = EventsWriter(str(self._folder / "events"), suffix)
            if resume_step:  # hides what another start wrote of the steps that will run again
                again = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(step=resume_step + 1, session_log=again))
            self._events.flush()

    def write(self, record: dict[str, float]) -> None:
        """Appends one record.

        Raises:
          OSError: a file cannot be written: which, and why.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with _written(self._path), self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint of a later step must not outlive it
        with _written(self._folder):
            for name, value in record.items():
                if name not in ("step", "tokens"):
                    summary = scalar(f"train/{name}", value)
                    event = Event(step=int(record["step"]), wall_time=time.time(), summary=summary)
                    self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        """Closes the events."""
        with _written(self._folder):
            self._events.close()


@contextlib.contextmanager
def _written(path: pathlib.Path) -> Iterator[None]:
    """Says what cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}). Mend the cause, then the same "
            f"command continues from the last checkpoint"
        ) from error


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`; none if it does not exist. A torn last line is ignored."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: no JSON ({error}); restore the file, or delete the line"
            ) from error
    return records


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
