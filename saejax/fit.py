"""Training over a run directory: fresh or resumed, saved, stopped cleanly by a signal."""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax import plan, processes
from saejax.capacity import warning_share
from saejax.checkpoint import Checkpoints
from saejax.data.arrays import refuse_non_finite
from saejax.data.feed import Feed
from saejax.mesh import MeshShape
from saejax.model import normalizer as normalizer_lib
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig
from saejax.recipe import Recipe
from saejax.train import hooks
from saejax.train import state as state_lib
from saejax.train.loop import Watch, run_steps
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import loss_spec, selection_metadata
from saejax.train.step import jit_step, make_step
from saejax.types import TrainState

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


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag, so that the step in progress is finished and saved."""

    def __init__(self):
        """Not asked to stop."""
        self._asked = False

    def __call__(self) -> bool:
        """Whether a signal arrived."""
        return self._asked

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Handles the signals while inside; a second one, a second later, acts as usual."""
        names = (signal.SIGTERM, signal.SIGINT)
        before = {name: signal.getsignal(name) for name in names}
        first = 0.0

        def handler(number, frame):
            nonlocal first
            if not self._asked:
                self._asked, first = True, time.monotonic()
                _LOG.info("%s: finishing the step, then saving", signal.Signals(number).name)
            elif time.monotonic() - first > 1:  # a cluster may send one signal by two ways
                for name in names:
                    signal.signal(name, before[name])
                signal.raise_signal(number)

        for name in names:
            signal.signal(name, handler)
        try:
            yield self
        finally:
            for name in names:
                signal.signal(name, before[name])


class AgreedStop:
    """Whether any process was asked to stop: the same answer in all of them, at the same step.

    Each call sends this process's wish into a maximum over all devices, and returns the outcome
    of the call before: that one is done, so no call waits for the step in progress.
    """

    def __init__(self, wish: Callable[[], bool], mesh: Mesh):
        """Puts both answers on the devices, so that a step transfers nothing."""
        feed = Feed(mesh_lib.token_sharding(mesh), mesh.size)
        n_local = sum(last - first for first, last in feed.ranges)
        self._wish = wish
        self._votes = [feed.place(np.full((n_local, 1), vote, np.int32)) for vote in (0, 1)]
        scalar = {"stop": jax.ShapeDtypeStruct((), jnp.int32)}
        shardings = mesh_lib.tree_shardings(mesh, scalar)
        self._count = jax.jit(lambda votes: {"stop": votes.max()}, out_shardings=shardings)
        self._block = mesh.devices.flat[0].platform == "cpu"  # see train/loop.py
        self._outcome: jax.Array | None = None

    def __call__(self) -> bool:
        """To be called once a step by every process."""
        before, self._outcome = self._outcome, self._count(self._votes[bool(self._wish())])["stop"]
        if self._block:
            jax.block_until_ready(self._outcome)
        return before is not None and bool(jax.device_get(before))


def fit(
    recipe: Recipe,
    batches: Any,
    *,
    identity: dict[str, str],
    checkpoints: pathlib.Path,
    write_to: pathlib.Path,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Trains to the end of the recipe, from the newest checkpoint if there is one.

    Args:
      recipe: what to train.
      batches: source with `iterate(start_step, ranges=...)`, `sample_rows(n)`,
        `tokens_per_epoch`, `d_model`.
      identity: fingerprints of the data, saved with each checkpoint and compared on resume.
      checkpoints: folder of the checkpoints.
      write_to: folder of metrics.jsonl and the TensorBoard events.
      stop_requested: asked every step; among several processes, one that says so stops all.

    Raises:
      ValueError: a checkpoint of other data or another shape; activations of another width or not
        finite.
      FloatingPointError: the loss is not finite.
    """
    sae, train = recipe.sae, recipe.train
    mesh = mesh_lib.make_mesh(plan.resolve_mesh(recipe, jax.devices()))
    normalizer, sample = _measure(recipe, batches)

    def create(mesh: Mesh) -> TrainState:
        return state_lib.create(train.seed, sae, recipe.optimizer, train.steps, sample, mesh)

    state = create(mesh)
    step_fn = jit_step(_step(recipe, normalizer, mesh), state, mesh)
    store = Checkpoints(checkpoints, recipe.checkpoint.keep)
    # Decided by one process: on a shared file system others may see a folder later.
    first = processes.lead("latest checkpoint", store.latest) or 0
    metadata = _metadata(recipe, normalizer, identity, mesh)
    if first:
        state = _resume(store, first, state, metadata)
    several = processes.count() > 1
    feed = Feed(mesh_lib.token_sharding(mesh), train.batch_size)
    rows = batches.iterate(first, ranges=feed.ranges)
    with _written(write_to, first, recipe, mesh) as write:
        watch = Watch(
            save=lambda state: store.save(state, metadata),
            save_every=recipe.checkpoint.every_steps,
            write=write,
            stop_requested=AgreedStop(stop_requested, mesh) if several else stop_requested,
        )
        state = run_steps(step_fn, state, rows, feed.place, train, watch)
    store.close()
    own = _own_mesh(mesh, sae.n_latents)
    return Fitted(
        export=_exporter(state, recipe, normalizer, checkpoints, own),
        untrained=lambda: SAE(sae, create(own).params, normalizer, own),
        stopped=int(state.step) < train.steps,
        dead_fraction=dead_fraction(state, recipe.loss),
    )


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

    yield write
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
        return lambda: _restore_model(*_locate(checkpoints), own)
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


def _metadata(
    recipe: Recipe, normalizer: Normalizer, identity: dict[str, str], mesh: Mesh
) -> dict[str, Any]:
    shards = mesh_lib.shape_of(mesh).latent
    spec = loss_spec(recipe.sae, recipe.loss, recipe.topk, shards)
    return {
        "sae": dataclasses.asdict(recipe.sae),
        "optimizer": dataclasses.asdict(recipe.optimizer),
        "normalizer": dataclasses.asdict(normalizer),
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size,
        "identity": identity,
        "selection": selection_metadata(spec, shards),
    }


def _resume(store: Checkpoints, step: int, fresh: TrainState, ours: dict[str, Any]) -> TrainState:
    metadata = store.metadata(step)
    name = store.directory / str(step)
    if metadata["identity"] != ours["identity"]:
        raise ValueError(
            f"checkpoint {name} was trained on other activations ({metadata['identity']}) than "
            f"this run reads ({ours['identity']}); restore them, or give another workdir"
        )
    if metadata["normalizer"] != ours["normalizer"]:
        raise ValueError(
            f"checkpoint {name} was trained with normaliser {metadata['normalizer']}, this run "
            f"measured {ours['normalizer']}; restore SAE.normalization, or give another workdir"
        )
    if metadata.get("selection") != ours["selection"] and processes.index() == 0:
        _LOG.warning(
            "checkpoint %s selected latents with %s, this run does with %s: where a shard's "
            "capacity cuts candidates off, the two select differently; "
            "TopK.capacity_factor = None is exact on any mesh",
            name,
            metadata.get("selection"),
            ours["selection"],
        )
    _LOG.info("resuming at step %d", step)
    return store.restore(step, abstract_like(fresh))


def abstract_like(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def dead_fraction(state: TrainState, loss: LossConfig) -> float:
    """Share of latents that have not fired for `loss.dead_tokens` tokens of training."""
    dead = jax.jit(lambda since: (since >= loss.dead_tokens).sum())(state.tokens_since_fired)
    return int(dead) / state.tokens_since_fired.shape[0]


def load(path: str | pathlib.Path) -> SAE:
    """Loads a trained autoencoder.

    Args:
      path: a run directory, its `checkpoints` folder, or one step folder in it.

    Returns:
      The model with its normaliser, on one device of this process: the bias-corrected EMA of the
      weights where training kept one.

    Raises:
      FileNotFoundError: there is no checkpoint at `path`.
      ValueError: the checkpoint does not fit its own description, or has another format.
    """
    own = mesh_lib.make_mesh(MeshShape(), jax.local_devices())
    return _restore_model(*_locate(pathlib.Path(path)), own)


def _restore_model(folder: pathlib.Path, step: int, mesh: Mesh) -> SAE:
    """The model of a checkpoint, on devices of this process."""
    store = Checkpoints(folder, alone=True)
    metadata = store.metadata(step)
    sae = SAEConfig(**metadata["sae"])
    optimizer = OptimizerConfig(**metadata["optimizer"])
    abstract = state_lib.abstract_state(sae, optimizer, metadata["steps"])
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        mesh_lib.tree_shardings(mesh, abstract),
    )
    state = store.restore(step, abstract)
    store.close()
    return state_lib.export(state, sae, optimizer, Normalizer(**metadata["normalizer"]), mesh)


def _locate(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The checkpoints folder and the step that `path` means."""
    for folder in (path / "checkpoints", path):
        steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit() and p.is_dir()]
        if steps:
            return folder, max(steps)
    if path.name.isdigit() and path.is_dir():
        return path.parent, int(path.name)
    raise FileNotFoundError(
        f"no checkpoint at {path}; give a run directory, its checkpoints folder, or a step folder"
    )
