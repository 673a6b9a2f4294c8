"""Training over a run directory: fresh or resumed, saved, stopped cleanly by a signal."""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax import plan, processes, watchdog
from saejax.capacity import warning_share
from saejax.checkpoint import Checkpoints
from saejax.data.arrays import refuse_non_finite
from saejax.data.feed import Feed
from saejax.loading import abstract_on, restore_model
from saejax.mesh import MeshShape
from saejax.model import normalizer as normalizer_lib
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE
from saejax.provenance import accept, describe_run, kept_normalizer
from saejax.recipe import Recipe
from saejax.rollback import train_through
from saejax.train import hooks
from saejax.train import state as state_lib
from saejax.train.loop import Watch, run_steps
from saejax.train.loss import LossConfig
from saejax.train.spec import loss_spec
from saejax.train.step import jit_step, make_step
from saejax.types import TrainState
from saejax.wishes import Wishes

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """What training leaves.

    Attributes:
      export: makes the trained model (bias-corrected EMA where one is kept), on the mesh; among
        several processes, on the devices of this one alone.
      untrained: makes the same model at its initialisation, to compare with.
      stopped: training was asked to stop before its end; the state is saved.
      dead_fraction: share of latents dead by the training definition.
    """

    export: Callable[[], SAE]
    untrained: Callable[[], SAE]
    stopped: bool
    dead_fraction: float

    @functools.cached_property
    def sae(self) -> SAE:
        """The trained model."""
        return self.export()


def fit(
    recipe: Recipe,
    batches: Any,
    *,
    identity: dict[str, str],
    checkpoints: pathlib.Path,
    write_to: pathlib.Path,
    stop_requested: Callable[[], bool] = lambda: False,
    config: Mapping[str, Any] | None = None,
    allow_config_change: bool = False,
) -> Fitted:
    """Trains to the end of the recipe, from the newest sound checkpoint if there is one.

    Killed at any moment, or stopped by a signal, the same call continues: states and records are
    then bit by bit those of a run that was not, on the same devices with the same versions.

    Args:
      recipe: what to train.
      batches: source with `iterate(start_step, ranges=...)`, `sample_rows(n)`,
        `tokens_per_epoch`, `d_model`; a batch must depend on its step alone.
      identity: fingerprints of the data, saved with each checkpoint and compared on resume.
      checkpoints: folder of the checkpoints.
      write_to: folder of metrics.jsonl and the TensorBoard events.
      stop_requested: asked every step; among several processes, one that says so stops all.
      config: the whole configuration, saved with each checkpoint: "json", compared on resume, and
        "gin", for the reader.
      allow_config_change: log what a checkpoint was trained with otherwise, instead of refusing it.

    Raises:
      ValueError: a checkpoint of another configuration, other data or another shape; activations
        of another width or not finite.
      OSError: a checkpoint cannot be written, or of several there is none that is sound.
      FloatingPointError: it diverged twice from the same checkpoint.
    """
    mesh = mesh_lib.make_mesh(plan.resolve_mesh(recipe, jax.devices()))
    normalizer, sample = _measure(recipe, batches)
    about = describe_run(recipe, normalizer, identity, mesh, config)

    parts = (recipe.train.seed, recipe.sae, recipe.optimizer, recipe.train.steps, sample)
    create = functools.partial(state_lib.create, *parts)
    training = _Training(
        recipe=recipe,
        mesh=mesh,
        store=Checkpoints(checkpoints, recipe.checkpoint.keep, recipe.checkpoint.keep_every),
        wishes=Wishes(recipe.checkpoint, stop_requested, mesh if processes.count() > 1 else None),
        about=about,
        accept=lambda metadata: accept(metadata, about, allow_config_change),
        create=create,
        normalizer=normalizer,
        batches=batches,
        write_to=write_to,
    )
    state, normalizer = training.run()
    own = _own_mesh(mesh, recipe.sae.n_latents)
    return Fitted(
        export=_exporter(state, recipe, normalizer, checkpoints, own),
        untrained=lambda: SAE(recipe.sae, create(own).params, normalizer, own),
        stopped=int(state.step) < recipe.train.steps,
        dead_fraction=dead_fraction(state, recipe.loss),
    )


class _Begin(NamedTuple):
    """Where training goes on: a checkpoint, or the start."""

    step: int
    state: TrainState
    window: Mapping[str, Any] | None
    normalizer: Normalizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Training:
    """The parts of one training, and how they work together; see `fit`."""

    recipe: Recipe
    mesh: Mesh
    store: Checkpoints
    wishes: Wishes
    about: Mapping[str, Any]
    accept: Callable[[dict[str, Any]], None]
    create: Callable[[Mesh], TrainState]
    normalizer: Normalizer
    batches: Any
    write_to: pathlib.Path

    def run(self) -> tuple[TrainState, Normalizer]:
        """Trains to the end, or until asked to stop; the last state, and its normaliser."""
        recipe = self.recipe
        abstract = abstract_on(self.mesh, recipe.sae, recipe.optimizer, recipe.train.steps)
        begin = self._begin(abstract)
        if begin.step:
            _LOG.info("resuming at step %d", begin.step)
        n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        processes.lead("room for checkpoints", lambda: self.store.prepare(n_bytes))
        own = dataclasses.replace(self, normalizer=begin.normalizer)
        step_fn = jit_step(_step(recipe, own.normalizer, self.mesh), abstract, self.mesh)

        def back(last_good: int) -> _Begin:
            with watchdog.phase("restore"):
                self.store.truncate(last_good)
            return own._begin(abstract)

        with _kept(self.store):
            state = train_through(begin, lambda begin: own._steps(step_fn, begin), back)
        return state, own.normalizer

    def _begin(self, abstract: TrainState) -> _Begin:
        with watchdog.phase("restore"):  # devices need not hold a fresh state beside the restored
            found = self.store.restore_newest(abstract, self.accept)
            if found is None:
                return _Begin(0, self.create(self.mesh), None, self.normalizer)
        step, state, metadata = found
        normalizer = kept_normalizer(metadata["normalizer"], self.normalizer)
        return _Begin(step, state, metadata["window"], normalizer)

    def _steps(self, step_fn: Callable, begin: _Begin) -> TrainState:
        feed = Feed(mesh_lib.token_sharding(self.mesh), self.recipe.train.batch_size)
        rows = self.batches.iterate(begin.step, ranges=feed.ranges)
        with _written(self.write_to, begin.step, self.recipe, self.mesh) as write:
            watch = Watch(
                save=self._save,
                save_due=self._save_due,
                write=write,
                stop_requested=self.wishes.stop,
                window=begin.window,
                rollback_after=self.recipe.guard.rollback_after,
                enter=watchdog.enter,
            )
            return run_steps(step_fn, begin.state, rows, feed.place, self.recipe.train, watch)

    def _save(self, state: TrainState, window: Mapping[str, Any]) -> None:
        tokens = int(state.step) * self.recipe.train.batch_size
        normalizer = dataclasses.asdict(self.normalizer)
        about = {**self.about, "normalizer": normalizer, "tokens": tokens, "window": window}
        self.store.save(state, about, doubtful=window["in_a_row"] > 0)

    def _save_due(self, step: int) -> bool:
        self.store.check()
        return self.wishes.save(step)


@contextlib.contextmanager
def _kept(store: Checkpoints) -> Iterator[None]:
    """Waits for the save in progress, whether training ends well or with an error."""
    try:
        yield
    except Exception:
        if processes.count() == 1:  # among several, the others may be gone, and it would not end
            with contextlib.suppress(OSError):  # of two errors, the one of training is told
                store.close()
        raise
    with watchdog.phase("save"):
        store.close()


@contextlib.contextmanager
def _written(
    folder: pathlib.Path, first: int, recipe: Recipe, mesh: Mesh
) -> Iterator[Callable[[dict[str, float]], None]]:
    """What takes the records: the files and the warnings of one process, nothing in the others."""
    if processes.index() > 0:
        yield lambda record: None
        return
    writer, warning = hooks.MetricsWriter(folder, first), _capacity_warning(recipe, mesh)

    def write(record: dict[str, float]) -> None:
        writer.write(record)
        warning.check(record)

    try:
        yield write
    except Exception:
        with contextlib.suppress(OSError):  # of two errors, the one of training is told
            writer.close()
        raise
    writer.close()


def _capacity_warning(recipe: Recipe, mesh: Mesh) -> hooks.CapacityWarning:
    shards = mesh_lib.shape_of(mesh).latent
    spec = loss_spec(recipe.sae, recipe.loss, recipe.topk, shards)
    chosen = {
        "at_capacity": spec.main,
        "multi_at_capacity": spec.multi,
        "auxk_at_capacity": spec.aux,
    }
    return hooks.CapacityWarning(
        {
            name: warning_share(selection.k, recipe.sae.n_latents, shards)
            for name, selection in chosen.items()
            if selection is not None
        }
    )


def _exporter(
    state: TrainState,
    recipe: Recipe,
    normalizer: Normalizer,
    checkpoints: pathlib.Path,
    own: Mesh,
) -> Callable[[], SAE]:
    """Makes the model of the last state, which is saved too."""
    if processes.count() > 1:  # no process holds all of it
        step = int(state.step)
        return lambda: restore_model(checkpoints, step, own)
    sae = state_lib.export(state, recipe.sae, recipe.optimizer, normalizer, own)
    return lambda: sae


def _own_mesh(mesh: Mesh, n_latents: int) -> Mesh:
    """The mesh, or one of this process's devices alone if others hold parts of it."""
    if processes.count() == 1:
        return mesh
    shards = math.gcd(len(jax.local_devices()), n_latents)
    return mesh_lib.make_mesh(MeshShape(1, shards), jax.local_devices())


def _step(recipe: Recipe, normalizer: Normalizer, mesh: Mesh) -> Callable:
    return make_step(
        recipe.sae,
        recipe.loss,
        recipe.optimizer,
        recipe.topk,
        normalizer,
        mesh,
        batch_tokens=recipe.train.batch_size,
        chunks=recipe.train.chunks(mesh_lib.shape_of(mesh)),
        steps=recipe.train.steps,
        data_exchange=recipe.mesh.data_exchange,
        kernels=recipe.kernels,
        guard=recipe.guard,
    )


def _measure(recipe: Recipe, batches: Any) -> tuple[Normalizer, np.ndarray]:
    """The normaliser, and the normalised sample that the initial state is measured on."""
    if batches.d_model != recipe.sae.d_model:
        raise ValueError(
            f"SAE.d_model = {recipe.sae.d_model} does not fit activations that are "
            f"{batches.d_model} wide; set SAE.d_model = {batches.d_model}"
        )
    n_rows = min(recipe.train.sample_rows, batches.tokens_per_epoch)
    rows = np.asarray(batches.sample_rows(n_rows), dtype=np.float32)
    refuse_non_finite(rows)
    normalizer = normalizer_lib.measure(recipe.sae.normalization, rows)
    return normalizer, np.asarray(normalizer.apply(jax.numpy.asarray(rows))[0])


def dead_fraction(state: TrainState, loss: LossConfig) -> float:
    """Share of latents that have not fired for `loss.dead_tokens` tokens of training."""
    dead = jax.jit(lambda since: (since >= loss.dead_tokens).sum())(state.tokens_since_fired)
    return int(dead) / state.tokens_since_fired.shape[0]
