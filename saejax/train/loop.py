"""The order of events in training, and nothing else."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from saejax.mesh import MeshShape
from saejax.train import guard, hooks
from saejax.types import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and batching of training.

    Attributes:
      tokens: tokens to train on; whole batches only, so at most this many.
      batch_size: tokens per step, over the whole mesh (131,072 in the paper).
      microbatch_size: tokens processed at once on each data row of the mesh; bounds memory, does
        not change the result beyond rounding. None processes the batch in one piece.
      sample_rows: activations that the initial pre_bias and the dataset's variance are measured on.
      log_every: steps between records.
      seed: of the initial weights.
    """

    tokens: int
    batch_size: int = 131_072
    microbatch_size: int | None = None
    sample_rows: int = 32_768
    log_every: int = 10
    seed: int = 0

    def __post_init__(self):
        for field in ("tokens", "batch_size", "sample_rows", "log_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)} must be at least 1")
        if self.tokens < self.batch_size:
            raise ValueError(
                f"tokens = {self.tokens} is less than one batch of batch_size = "
                f"{self.batch_size}; train on more tokens or lower batch_size"
            )
        if self.microbatch_size is not None and self.microbatch_size < 1:
            raise ValueError(
                f"microbatch_size = {self.microbatch_size} must be at least 1, or None"
            )

    @property
    def steps(self) -> int:
        """Steps of training."""
        return self.tokens // self.batch_size

    def chunks(self, shape: MeshShape) -> int:
        """Microbatches per step on each data row of a mesh.

        Every device feeds the same number of tokens to each of them.

        Raises:
          ValueError: the microbatch does not divide a row's share of the batch, or its tokens do
            not split over the latent shards.
        """
        if self.microbatch_size is None:
            return 1
        share, size = self.batch_size // shape.data, self.microbatch_size
        if share % size or size % shape.latent:
            fitting = [s for s in range(shape.latent, share + 1, shape.latent) if share % s == 0]
            near = max((s for s in fitting if s <= size), default=fitting[0])
            raise ValueError(
                f"Train.microbatch_size = {size} must divide batch_size / data = {share} and be a "
                f"multiple of the {shape.latent} latent shards of Mesh.mesh_shape = "
                f"({shape.data}, {shape.latent}); {near} does, for one"
            )
        return share // size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What the loop reports to.

    Attributes:
      save: writes a checkpoint of a state and of the open window (`hooks.Window.state`).
      save_due: asked every step, after `stop_requested`, whether to save it; the last step is
        always saved. Raises what befell a save in the background. Among several processes its
        answer must be the same in all.
      write: takes each metrics record.
      stop_requested: asked once a step, after it was dispatched; among several processes its answer
        must be the same in all.
      window: the open window of the checkpoint that training goes on from.
      rollback_after: skipped steps in a row that end the loop with `hooks.DivergedError`.
      enter: told what comes next, "compile", "step" or "save", for a watchdog.
    """

    save: Callable[[TrainState, dict[str, Any]], None]
    save_due: Callable[[int], bool]
    write: Callable[[dict[str, float]], None]
    stop_requested: Callable[[], bool]
    window: Mapping[str, Any] | None = None
    rollback_after: int | None = None
    enter: Callable[[str], None] = lambda phase: None


def run_steps(
    step_fn: Callable,
    state: TrainState,
    batches: Iterable[np.ndarray],
    place: Callable[[np.ndarray], jax.Array],
    config: TrainConfig,
    watch: Watch,
) -> TrainState:
    """Trains from `state.step` to the end of `config`, or until asked to stop.

    Order of events, per step: dispatch step i; read batch i + 1 and start its transfer; check and
    count the metrics of step i - 1; record if due; save if due. All but the record and the save
    overlap with step i. A state is saved only after its own metrics were counted, and none among
    skipped steps: a save that is due then follows the next accepted one. When asked to stop, the
    current step is finished and saved, with the sums of the window that is open: the records of a
    run are the same, but for the times in them, however often it was stopped.

    Args:
      step_fn: the compiled step.
      state: where to begin; donated.
      batches: raw activations from step `state.step` on, the rows that this process holds.
      place: starts the transfer of a batch to the devices (`Feed.place`).
      config: length and cadence.
      watch: what is called on the way.

    Returns:
      The last state; its step tells whether training was stopped early.

    Raises:
      DivergedError: too many steps in a row were skipped; or the last ones, by bad weights.
      ValueError: the batches ended too soon.
    """
    first, variance = int(state.step), float(state.variance)
    n_latents = state.tokens_since_fired.shape[0]
    last, started = config.steps, time.monotonic()
    window = hooks.Window(variance, watch.window, most_in_a_row=watch.rollback_after)
    source = _timed(iter(batches), window)
    arriving = _next(source, place, first, last)
    block, late = _must_block(arriving), False
    watch.enter("compile")
    for done in range(first + 1, last + 1):
        state, metrics = step_fn(state, arriving)
        watch.enter("step")
        if block:  # before the next batch too: to make one may need the devices
            jax.block_until_ready(metrics)
        arriving = _next(source, place, done, last)
        window.add(done, metrics)
        ending = watch.stop_requested() or done == last
        due = watch.save_due(done) or ending or late
        if done == last or done % config.log_every == 0:
            record = window.close(done, n_latents, done * config.batch_size)
            if record is not None:
                watch.write(record)
                seconds_left = (time.monotonic() - started) / (done - first) * (last - done)
                hooks.log_progress(record, last, seconds_left)
        late = due and not _saved(state, window, watch, ending)
        if ending:
            break
    return state


def _saved(state: TrainState, window: hooks.Window, watch: Watch, ending: bool) -> bool:
    """Saves the state, unless its step was skipped or spoiled it; whether it did."""
    window.settle()
    if window.in_a_row and not ending:
        return False
    if not guard.all_finite(state.params):  # an update of finite numbers may overflow
        if ending:
            raise window.diverged(int(state.step))
        return False
    watch.enter("save")
    watch.save(state, window.state())
    watch.enter("step")
    return True


def _timed(source: Iterator[np.ndarray], window: hooks.Window) -> Iterator[np.ndarray]:
    """The same batches; the time they take to come is time that the loop waits."""
    while True:
        began = time.monotonic()
        rows = next(source, None)
        window.wait(time.monotonic() - began)
        if rows is None:
            return
        yield rows


def _next(
    source: Iterator[np.ndarray], place: Callable[[np.ndarray], jax.Array], done: int, last: int
) -> jax.Array | None:
    """The batch after step `done` on its way to the devices; None after the last step."""
    if done >= last:
        return None
    for rows in source:
        return place(rows)
    raise ValueError(
        f"the activations ended after step {done} of {last}; provide more tokens or lower "
        f"Train.tokens"
    )


def _must_block(batch: jax.Array | None) -> bool:
    """Whether steps may not queue up: CPU devices that talk to each other would deadlock."""
    devices = () if batch is None else batch.sharding.device_set
    return len(devices) > 1 and next(iter(devices)).platform == "cpu"
