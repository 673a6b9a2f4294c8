"""The order of events in training, and nothing else."""

import dataclasses
import time
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import NamedSharding

from saejax.mesh import MeshShape
from saejax.train import hooks
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
      save: writes a checkpoint.
      save_every: steps between checkpoints; the last step is always saved.
      write: takes each metrics record.
      stop_requested: asked after every step.
    """

    save: Callable[[TrainState], None]
    save_every: int
    write: Callable[[dict[str, float]], None]
    stop_requested: Callable[[], bool]


def run_steps(
    step_fn: Callable,
    state: TrainState,
    batches: Iterable[np.ndarray],
    sharding: NamedSharding,
    config: TrainConfig,
    watch: Watch,
) -> TrainState:
    """Trains from `state.step` to the end of `config`, or until asked to stop.

    Order of events, per step: dispatch step i; check and count the metrics of step i - 1, which
    overlaps with it; record if due; save if due. A state is saved only after its own metrics were
    found finite. When asked to stop, the current step is finished and saved.

    Args:
      step_fn: the compiled step.
      state: where to begin; donated.
      batches: raw activations `[batch_size, D]` from step `state.step` on.
      sharding: of a batch.
      config: length and cadence.
      watch: what is called on the way.

    Returns:
      The last state; its step tells whether training was stopped early.

    Raises:
      FloatingPointError: the loss is not finite.
      ValueError: the batches ended too soon.
    """
    first, last, started = int(state.step), config.steps, time.monotonic()
    n_latents = state.tokens_since_fired.shape[0]
    window = hooks.Window(float(state.variance))
    # Forced CPU devices deadlock when steps queue up; a real accelerator wants the queue.
    block = jax.default_backend() == "cpu" and len(sharding.device_set) > 1
    stop, done = False, first
    for done, rows in zip(range(first + 1, last + 1), batches, strict=False):
        state, metrics = step_fn(state, jax.device_put(rows, sharding))
        if block:
            jax.block_until_ready(metrics)
        window.add(done, metrics)
        stop = watch.stop_requested()
        ending = stop or done == last
        if ending or done % config.log_every == 0:
            record = window.close(done, n_latents, done * config.batch_size)
            watch.write(record)
            seconds_left = (time.monotonic() - started) / (done - first) * (last - done)
            hooks.log_progress(record, last, seconds_left)
        if ending or done % watch.save_every == 0:
            window.settle()
            watch.save(state)
        if ending:
            break
    if done < last and not stop:
        raise ValueError(
            f"the activations ended after step {done} of {last}; provide more tokens or lower "
            f"Train.tokens"
        )
    return state
