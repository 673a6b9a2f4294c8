"""The Python interface for notebooks: plain dataclasses in, a module out; no gin."""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from saejax import processes
from saejax.capacity import TopKConfig
from saejax.checkpoint import CheckpointConfig
from saejax.data.arrays import ArraySource
from saejax.data.loader import LoaderConfig
from saejax.fit import fit
from saejax.loading import load
from saejax.mesh import MeshConfig, make_mesh
from saejax.model.sae import SAE, SAEConfig
from saejax.plan import resolve_mesh
from saejax.recipe import Recipe
from saejax.rundir import RunDirectory
from saejax.sources import DataConfig, open_source
from saejax.train.guard import GuardConfig
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import KernelConfig

__all__ = ["load", "train"]


def train(
    data: np.ndarray | jax.Array | DataConfig,
    *,
    sae: SAEConfig,
    train: TrainConfig,
    loss: LossConfig = LossConfig(),
    optimizer: OptimizerConfig = OptimizerConfig(),
    topk: TopKConfig = TopKConfig(),
    mesh: MeshConfig = MeshConfig(),
    kernels: KernelConfig = KernelConfig(),
    loader: LoaderConfig = LoaderConfig(),
    checkpoint: CheckpointConfig = CheckpointConfig(),
    guard: GuardConfig = GuardConfig(),
    workdir: str | pathlib.Path | None = None,
) -> SAE:
    """Trains an autoencoder.

    Args:
      data: activations `[N, D]` in memory, or a `HarvestConfig`, `StoredConfig`, `StreamConfig`
        or `SyntheticConfig`.
      sae, train, loss, optimizer, topk, mesh, kernels, loader, checkpoint, guard: as in a gin
        file; the defaults are the paper's, but for the capacity of a sharded top-k.
      workdir: run directory for activations, checkpoints and metrics; calling again with the same
        one and the same arguments continues the run. None uses a temporary folder and keeps
        nothing; several processes need one that all of them see.

    Returns:
      The trained model, as `saejax.load` would return it.

    Raises:
      ValueError: settings that do not fit each other or the data, or a workdir that holds another
        run.
      ConnectionError: of several processes, one did not start, or ended.
    """
    recipe = Recipe(
        sae=sae,
        train=train,
        loss=loss,
        optimizer=optimizer,
        topk=topk,
        mesh=mesh,
        kernels=kernels,
        checkpoint=checkpoint,
        guard=guard,
    )
    with processes.losses_named():
        processes.join()
        make_mesh(resolve_mesh(recipe, jax.devices()))  # too few: found before anything is made
        if workdir is not None:
            return _train(data, recipe, loader, RunDirectory(workdir))
        if processes.count() > 1:
            raise ValueError(
                f"workdir = None keeps nothing, but the {processes.count()} processes of this run "
                f"meet in its folder; give a workdir that all of them see"
            )
        with tempfile.TemporaryDirectory(prefix="saejax-") as folder:
            return _train(data, recipe, loader, RunDirectory(folder))


def _train(data: Any, recipe: Recipe, loader: LoaderConfig, run: RunDirectory) -> SAE:
    parts = {"recipe": dataclasses.asdict(recipe), "loader": dataclasses.asdict(loader)}
    batch_size = recipe.train.batch_size
    stored = isinstance(data, DataConfig)
    if stored:
        parts["data"] = {"class": type(data).__name__, **dataclasses.asdict(data)}
    else:
        batches = ArraySource(np.asarray(data), batch_size, loader.seed)
        identity = {"array": batches.fingerprint}
    token = processes.lead(
        "claim of the run directory", lambda: run.claim(parts, "", ["saejax.train"])
    )
    run.require_claim(token, f"process {processes.index()} of {processes.count()}")
    processes.meet("the run directory")  # nothing is compiled before all have seen it
    if stored:
        mesh = make_mesh(resolve_mesh(recipe, jax.devices()))
        source = open_source(data, recipe.sae, loader, batch_size, run.activations, mesh)
        batches, identity = source.batches, source.identity
    return fit(
        recipe,
        batches,
        identity=identity,
        checkpoints=run.checkpoints,
        write_to=run.path,
        config={"json": parts},
    ).sae
