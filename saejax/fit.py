"""Training over a run directory: fresh or resumed, saved, stopped cleanly by a signal."""

import contextlib
import dataclasses
import logging
import pathlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax import plan
from saejax.checkpoint import Checkpoints
from saejax.data.arrays import refuse_non_finite
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
from saejax.train.step import jit_step, make_step
from saejax.types import TrainState

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """What training leaves.

    Attributes:
      sae: the trained model (bias-corrected EMA where one is kept).
      untrained: makes the same model at its initialisation, to compare with.
      stopped: training was asked to stop before its end; the state is saved.
      dead_fraction: share of latents dead by the training definition.
    """

    sae: SAE
    untrained: Callable[[], SAE]
    stopped: bool
    dead_fraction: float


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
        """Handles the signals while inside; a second one acts as usual."""
        names = (signal.SIGTERM, signal.SIGINT)
        before = {name: signal.getsignal(name) for name in names}

        def handler(number, frame):
            del frame
            self._asked = True
            for name in names:
                signal.signal(name, before[name])
            _LOG.info("%s: finishing the step, then saving", signal.Signals(number).name)

        for name in names:
            signal.signal(name, handler)
        try:
            yield self
        finally:
            for name in names:
                signal.signal(name, before[name])


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
      batches: source with `iterate(start_step)`, `sample_rows(n)`, `tokens_per_epoch`, `d_model`.
      identity: fingerprints of the data, saved with each checkpoint and compared on resume.
      checkpoints: folder of the checkpoints.
      write_to: folder of metrics.jsonl and the TensorBoard events.
      stop_requested: asked after every step.

    Raises:
      ValueError: a checkpoint of other data or another shape; activations of another width or not
        finite.
      FloatingPointError: the loss is not finite.
    """
    sae, train = recipe.sae, recipe.train
    mesh = mesh_lib.make_mesh(plan.resolve_mesh(recipe, jax.devices()))
    normalizer, sample = _measure(recipe, batches)

    def create() -> TrainState:
        return state_lib.create(train.seed, sae, recipe.optimizer, train.steps, sample, mesh)

    state = create()
    step_fn = jit_step(_step(recipe, normalizer, mesh), state, mesh)
    store = Checkpoints(checkpoints, recipe.checkpoint.keep)
    first = store.latest() or 0
    if first:
        state = _resume(store, first, state, normalizer, identity)
    writer = hooks.MetricsWriter(write_to, first)
    watch = Watch(
        save=lambda state: store.save(state, _metadata(recipe, normalizer, identity)),
        save_every=recipe.checkpoint.every_steps,
        write=writer.write,
        stop_requested=stop_requested,
    )
    rows = batches.iterate(first)
    state = run_steps(step_fn, state, rows, mesh_lib.token_sharding(mesh), train, watch)
    writer.close()
    store.close()
    return Fitted(
        sae=state_lib.export(state, sae, recipe.optimizer, normalizer),
        untrained=lambda: SAE(sae, create().params, normalizer),
        stopped=int(state.step) < train.steps,
        dead_fraction=dead_fraction(state, recipe.loss),
    )


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


def _metadata(recipe: Recipe, normalizer: Normalizer, identity: dict[str, str]) -> dict[str, Any]:
    return {
        "sae": dataclasses.asdict(recipe.sae),
        "optimizer": dataclasses.asdict(recipe.optimizer),
        "normalizer": dataclasses.asdict(normalizer),
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size,
        "identity": identity,
    }


def _resume(
    store: Checkpoints,
    step: int,
    fresh: TrainState,
    normalizer: Normalizer,
    identity: dict[str, str],
) -> TrainState:
    metadata = store.metadata(step)
    if metadata["identity"] != identity:
        raise ValueError(
            f"checkpoint {store.directory / str(step)} was trained on other activations "
            f"({metadata['identity']}) than this run reads ({identity}); restore them, or give "
            f"another workdir"
        )
    if metadata["normalizer"] != dataclasses.asdict(normalizer):
        raise ValueError(
            f"checkpoint {store.directory / str(step)} was trained with normaliser "
            f"{metadata['normalizer']}, this run measured {dataclasses.asdict(normalizer)}; "
            f"restore SAE.normalization, or give another workdir"
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
    return float((np.asarray(state.tokens_since_fired) >= loss.dead_tokens).mean())


def load(path: str | pathlib.Path) -> SAE:
    """Loads a trained autoencoder.

    Args:
      path: a run directory, its `checkpoints` folder, or one step folder in it.

    Returns:
      The model with its normaliser, on the default device: the bias-corrected EMA of the weights
      where training kept one.

    Raises:
      FileNotFoundError: there is no checkpoint at `path`.
      ValueError: the checkpoint does not fit its own description, or has another format.
    """
    folder, step = _locate(pathlib.Path(path))
    store = Checkpoints(folder)
    metadata = store.metadata(step)
    sae = SAEConfig(**metadata["sae"])
    optimizer = OptimizerConfig(**metadata["optimizer"])
    abstract = state_lib.abstract_state(sae, optimizer, metadata["steps"])
    shardings = mesh_lib.tree_shardings(mesh_lib.make_mesh(MeshShape()), abstract)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    state = store.restore(step, abstract)
    store.close()
    return state_lib.export(state, sae, optimizer, Normalizer(**metadata["normalizer"]))


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
