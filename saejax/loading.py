"""Trained autoencoders, read back from the checkpoints of a run."""

import os
import pathlib

import jax
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax.checkpoint import Checkpoints
from saejax.mesh import MeshShape
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig
from saejax.train import state as state_lib
from saejax.train.optim import OptimizerConfig
from saejax.types import TrainState


def load(path: str | os.PathLike[str]) -> SAE:
    """Loads a trained autoencoder, after every byte of it was compared with its checksums.

    Args:
      path: a run directory, its `checkpoints` folder, or one step folder in it.

    Returns:
      The model with its normaliser, on one device of this process: the bias-corrected EMA of the
      weights where training kept one.

    Raises:
      FileNotFoundError: there is no checkpoint at `path`.
      ValueError: the checkpoint does not fit its own description, or has another format.
      DamageError: it is not what was written; an older step may be named instead.
    """
    own = mesh_lib.make_mesh(MeshShape(), jax.local_devices())
    return restore_model(*_locate(pathlib.Path(path)), own)


def restore_model(folder: pathlib.Path, step: int, mesh: Mesh) -> SAE:
    """The model of a checkpoint, on devices of this process."""
    store = Checkpoints(folder, alone=True)
    metadata = store.metadata(step)
    sae = SAEConfig(**metadata["sae"])
    optimizer = OptimizerConfig(**metadata["optimizer"])
    state = store.restore(step, abstract_on(mesh, sae, optimizer, metadata["steps"]))
    store.close()
    return state_lib.export(state, sae, optimizer, Normalizer(**metadata["normalizer"]), mesh)


def abstract_on(mesh: Mesh, sae: SAEConfig, optimizer: OptimizerConfig, steps: int) -> TrainState:
    """Shapes, dtypes and shardings of a state on a mesh, without making it."""
    abstract = state_lib.abstract_state(sae, optimizer, steps)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        mesh_lib.tree_shardings(mesh, abstract),
    )


def _locate(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The checkpoints folder and the step that `path` means."""
    for folder in (path / "checkpoints", path):
        if (step := Checkpoints(folder, alone=True).latest()) is not None:
            return folder, step
    if path.name.isdigit() and path.is_dir():
        return path.parent, int(path.name)
    raise FileNotFoundError(
        f"no checkpoint at {path}; give a run directory, its checkpoints folder, or a step folder"
    )
