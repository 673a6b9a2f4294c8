"""Which mesh and which microbatch: every shape that fits the recipe, ranked by expected time."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from saejax import mesh as mesh_lib
from saejax.mesh import MeshShape
from saejax.plan.estimate import Estimate
from saejax.plan.hardware import Topology, topology_of
from saejax.plan.workload import Workload
from saejax.recipe import Recipe
from saejax.train.spec import bytes_over_data, loss_spec

# An estimate this close to the memory of a device may not fit it once it is compiled.
_SAFE_SHARE = 0.9

_TOO_LARGE = 2  # rank of what no memory holds

# Products with fewer rows leave matrix units idle, which the estimate does not see.
_LEAST_ROWS = 2048

AS_FAST = 1.1
"""Meshes whose times are this close are the same to an estimate; less memory is then worth more."""

# Of one mesh the estimate errs alike, so that its microbatches are told apart by less.
_MICROBATCH_AS_FAST = 1.01


def resolve_mesh(recipe: Recipe, devices: Sequence[jax.Device]) -> MeshShape:
    """The mesh of a recipe on these devices; chooses one where the recipe says 'auto'.

    Of those that fit memory and are about as fast by estimate as the fastest, the one that takes
    the least of it; on devices whose rates are not known, the one
    that moves the fewest bytes.

    Raises:
      ValueError: no shape of that many devices divides the latents and the batch.
    """
    slices = mesh_lib.count_slices(devices)
    return choose_mesh(recipe, len(devices), topology_of(devices), slices)


def choose_mesh(
    recipe: Recipe,
    n_devices: int,
    topology: Topology | None,
    slices: int = 1,
    *,
    where: str = "present",
) -> MeshShape:
    """`resolve_mesh` for so many devices of a kind that may be unknown, in so many slices.

    `where` they are is for the error.
    """
    if recipe.mesh.shape is not None:
        return recipe.mesh.shape
    shapes = fitting_shapes(recipe, n_devices, slices, where=where)
    if topology is None or topology.chip.kind == "cpu":
        return min(shapes, key=lambda shape: (_bytes_moved(recipe, shape), shape.data))
    return _best([Estimate(Workload(recipe, shape, topology)) for shape in shapes]).work.shape


def _best(estimates: Sequence[Estimate], as_fast: float = AS_FAST) -> Estimate:
    """Of those about as fast as the fastest that fits, the one that takes the least memory."""
    crowding, cost = min(map(_rank, estimates))
    if crowding == _TOO_LARGE:
        return min(estimates, key=_rank)
    near = [e for e in estimates if _rank(e)[0] == crowding and _rank(e)[1] <= as_fast * cost]
    return min(near, key=lambda e: e.peak)


def fitting_shapes(
    recipe: Recipe, n_devices: int, slices: int = 1, *, where: str = "present"
) -> list[MeshShape]:
    """Every mesh of exactly so many devices that divides latents, batch and microbatch.

    Latents are not split across slices, whose network is slow.

    Raises:
      ValueError: there is none.
    """
    shapes = [
        shape
        for shape in mesh_lib.shapes_of(n_devices)
        if shape.data % slices == 0 and _divides(recipe, shape)
    ]
    if not shapes:
        train = recipe.train
        sizes = [
            f"SAE.n_latents = {recipe.sae.n_latents}",
            f"Train.batch_size = {train.batch_size}",
        ]
        if train.microbatch_size is not None:
            sizes.append(f"Train.microbatch_size = {train.microbatch_size}")
        raise ValueError(
            f"Mesh.mesh_shape = 'auto' finds no mesh of the {n_devices} devices {where}: "
            f"{', '.join(sizes[:-1])} and {sizes[-1]} must divide by its sides; change one, or set "
            f"Mesh.mesh_shape = (1, 1) for one device"
        )
    return shapes


def _divides(recipe: Recipe, shape: MeshShape) -> bool:
    try:
        recipe.check_mesh(shape)
    except ValueError:
        return False
    return True


def _bytes_moved(recipe: Recipe, shape: MeshShape) -> float:
    """Bytes each device receives: tokens to and fro over 'latent', and what goes over 'data'."""
    sae, train = recipe.sae, recipe.train
    spec = loss_spec(sae, recipe.loss, recipe.topk, shape.latent, platform="cpu")
    codes, gradients = bytes_over_data(spec, sae, shape, train.batch_size)
    over_data = {"codes": codes, "gradients": gradients}.get(recipe.mesh.data_exchange)
    to_and_fro = 2 * spec.dtype.itemsize + 4  # tokens and residuals; reconstructions
    tokens = train.batch_size / shape.data * sae.d_model * to_and_fro * (1 - 1 / shape.latent)
    return tokens + (min(codes, gradients) if over_data is None else over_data)


def with_mesh(recipe: Recipe, shape: MeshShape, microbatch: int) -> Recipe:
    """The recipe on another mesh, with another microbatch."""
    return dataclasses.replace(
        recipe,
        mesh=dataclasses.replace(recipe.mesh, mesh_shape=tuple(shape)),
        train=dataclasses.replace(recipe.train, microbatch_size=microbatch),
    )


def candidates(recipe: Recipe, topology: Topology) -> list[Estimate]:
    """Every mesh of the topology with the microbatch that suits it, best first, the rest by time.

    What fits memory safely comes before what may fit, and that before what does not.
    Microbatches are powers of two times the latent shards, whose tokens they split over.
    """
    found = []
    for shape in mesh_lib.shapes_of(topology.devices):
        tried = []
        for size in _microbatches(recipe, shape):
            changed = with_mesh(recipe, shape, size)
            if _divides(changed, shape):
                tried.append(Estimate(Workload(changed, shape, topology)))
        if tried:
            found.append(_frugal(tried))
    if not found:
        return []
    best = _best(found)
    return [best, *sorted((e for e in found if e is not best), key=_rank)]


def _frugal(tried: Sequence[Estimate]) -> Estimate:
    """Of estimates about as fast as the best, the one that takes the least memory."""
    tried = [e for e in tried if e.work.block >= _LEAST_ROWS and e.fits()] or tried
    return _best(tried, _MICROBATCH_AS_FAST)


def _rank(estimate: Estimate) -> tuple[int, float]:
    """What fits safely, then what may fit, each by time; then what does not fit, by memory."""
    memory = estimate.work.topology.chip.memory
    if memory and estimate.peak > memory:
        return _TOO_LARGE, estimate.peak
    return int(bool(memory) and estimate.peak > _SAFE_SHARE * memory), estimate.step_seconds


def _microbatches(recipe: Recipe, shape: MeshShape) -> Iterator[int]:
    share, size = recipe.train.batch_size // shape.data, shape.latent
    while size <= share:
        if share % size == 0 and share // size <= 1024:
            yield size
        size *= 2


def bindings(estimate: Estimate) -> list[str]:
    """The choice as lines of a gin file."""
    shape = estimate.work.shape
    return [
        f"Mesh.mesh_shape = ({shape.data}, {shape.latent})",
        f"Train.microbatch_size = {estimate.work.recipe.train.microbatch_size}",
    ]
