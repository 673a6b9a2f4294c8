"""What a run will need, from its configuration alone: parameters, bytes per device, FLOPs."""

from collections.abc import Sequence

import jax
import numpy as np

from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.mesh import LATENT, MeshShape, tree_specs
from saejax.model.sae import SAEConfig
from saejax.recipe import Recipe
from saejax.train import state as state_lib
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import loss_spec

# Projection, Adam, unit norm and EMA: arithmetic per parameter, counted from their equations.
_OPTIMIZER_FLOPS = 30


def resolve_mesh(recipe: Recipe, devices: Sequence[jax.Device]) -> MeshShape:
    """The mesh of a recipe on these devices; chooses one where the recipe says 'auto'.

    Raises:
      ValueError: no shape of that many devices divides the latents and the batch.
    """
    if recipe.mesh.shape is not None:
        return recipe.mesh.shape

    def fits(shape: MeshShape) -> bool:
        try:
            recipe.check_mesh(shape)
        except ValueError:
            return False
        return True

    def bytes_moved(shape: MeshShape) -> float:
        tokens = recipe.train.batch_size / shape.data * 8 * (1 - 1 / shape.latent)
        gradients = recipe.sae.n_latents / shape.latent * 16 * (1 - 1 / shape.data)
        return tokens + gradients

    shapes = [shape for shape in mesh_lib.shapes_of(len(devices)) if fits(shape)]
    if not shapes:
        raise ValueError(
            f"Mesh.mesh_shape = 'auto' finds no mesh of the {len(devices)} devices present: "
            f"SAE.n_latents = {recipe.sae.n_latents} and Train.batch_size = "
            f"{recipe.train.batch_size} must divide by its sides; change one, or set "
            f"Mesh.mesh_shape = (1, 1) for one device"
        )
    return min(shapes, key=bytes_moved)


def flops_per_token(sae: SAEConfig, loss: LossConfig, batch_size: int) -> dict[str, float]:
    """Estimated floating-point operations per token of a training step, by part.

    A multiply-add counts as two. The encoder forward is the only dense part; the sparse ones move
    k rows each (Gao et al. 2024, App. D). AuxK depends on how many latents are dead: not counted.
    """
    row = 2.0 * sae.d_model
    spec = loss_spec(sae, loss, TopKConfig(), 1)
    kept = sae.k + spec.k_multi
    return {
        "encoder forward": row * sae.n_latents,
        "sparse decode": row * kept,
        "sparse gradients": 3 * row * kept,
        "optimizer": _OPTIMIZER_FLOPS * 2.0 * sae.n_latents * sae.d_model / batch_size,
    }


def bytes_per_device(
    sae: SAEConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    mesh: MeshShape,
) -> dict[str, int]:
    """Bytes of the resident arrays on each device, by part; estimates, not a compiled program's."""
    state = state_lib.abstract_state(sae, optimizer, train.steps)

    def local(tree) -> int:
        def size(leaf, spec) -> int:
            return leaf.size * leaf.dtype.itemsize // (mesh.latent if LATENT in spec else 1)

        return sum(jax.tree.leaves(jax.tree.map(size, tree, tree_specs(tree))))

    rows = train.batch_size // mesh.data
    block = rows // train.chunks(mesh)
    matrix = sae.n_latents // mesh.latent * sae.d_model
    return {
        "parameters": local(state.params),
        "optimizer": local(state.opt_state),
        "EMA": local(state.ema) if state.ema is not None else 0,
        "gradients": 4 * 2 * matrix * (2 if rows > block else 1),
        "batch: raw, normalised, residual": 3 * 4 * rows * sae.d_model,
        "pre-activations of a microbatch": 4 * block * (sae.n_latents // mesh.latent),
    }


def describe(
    sae: SAEConfig,
    loss: LossConfig,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    mesh: MeshShape,
) -> str:
    """The plan as text for `--dry_run`."""
    lines = [
        f"mesh        data {mesh.data} x latent {mesh.latent} = {mesh.size} devices",
        f"training    {train.steps:,} steps of {train.batch_size:,} tokens "
        f"({train.steps * train.batch_size:,} tokens), "
        f"{train.chunks(mesh)} microbatches a step",
        f"rate        {optimizer.resolve_learning_rate(sae.n_latents):.3g}, k_aux "
        f"{loss_spec(sae, loss, TopKConfig(), 1).k_aux}",
        "",
        "parameters  shape (whole)             count",
    ]
    shapes = sae.param_shapes()
    for name, shape in shapes.items():
        count = int(np.prod(shape, dtype=np.int64))
        lines.append(f"  {name:<12}{'x'.join(map(str, shape)):<22}{count:>16,}")
    total = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    lines += [f"  {'total':<34}{total:>16,}", "", "bytes per device (estimate; AuxK not counted)"]
    sizes = bytes_per_device(sae, loss, optimizer, train, mesh)
    lines += [f"  {part:<34}{_bytes(size):>16}" for part, size in sizes.items()]
    lines += [f"  {'total':<34}{_bytes(sum(sizes.values())):>16}", ""]
    lines.append("FLOPs per token (estimate; AuxK not counted)")
    flops = flops_per_token(sae, loss, train.batch_size)
    lines += [f"  {part:<34}{count:>16,.0f}" for part, count in flops.items()]
    lines.append(f"  {'total':<34}{sum(flops.values()):>16,.0f}")
    return "\n".join(lines)


def _bytes(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
