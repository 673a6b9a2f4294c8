"""The device mesh and the one table from array name to `PartitionSpec`.

Axes: 'data' splits tokens, 'latent' splits latents. Tokens enter split over the whole mesh, so
that every device is fed its own rows. One device is the 1 x 1 mesh and runs the same code.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"
LATENT = "latent"

_SPECS = {
    "w_enc": P(LATENT, None),
    "w_dec": P(LATENT, None),
    "latent_bias": P(LATENT),
    "pre_bias": P(),
    "tokens_since_fired": P(LATENT),
    "recent": P(),
}
# A subject model's matrices by part: the axis that is split over 'latent'. Outputs of q, k, v, gate
# and up, inputs of o and down, so that only o and down need a sum between devices.
_SUBJECT_AXIS = {"q": -1, "k": -1, "v": -1, "gate": -1, "up": -1, "o": 0, "down": 0}
_SUBJECT_AXIS |= {"embed": 0, "head": -1}
_TOKENS = P((DATA, LATENT), None)
_REPLICATED = P()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh, as a configuration asks for it.

    Attributes:
      mesh_shape: devices along ('data', 'latent'); each of the latent shards holds n_latents /
        latent rows of both matrices, each data row all latents and its own tokens. 'auto' takes
        every device there is, in the shape that is expected to be fastest and fits memory.
      data_exchange: what data rows send each other: 'gradients' sums the weight gradients,
        'codes' gathers sparse codes, inputs and residuals, from which each row makes the whole
        gradient; 'auto' takes the one of fewer bytes. The result is the same beyond rounding.
    """

    mesh_shape: tuple[int, int] | Literal["auto"] = "auto"
    data_exchange: Literal["auto", "gradients", "codes"] = "auto"

    def __post_init__(self):
        if self.data_exchange not in ("auto", "gradients", "codes"):
            raise ValueError(
                f"data_exchange = {self.data_exchange!r} must be 'auto', 'gradients' or 'codes'"
            )
        shape = self.mesh_shape
        whole = isinstance(shape, tuple) and [type(size) for size in shape] == [int, int]
        if shape != "auto" and not (whole and min(shape) >= 1):
            raise ValueError(
                f"mesh_shape = {shape!r} must be (data, latent), two whole numbers, each at least "
                f"1, or 'auto'"
            )

    @property
    def shape(self) -> "MeshShape | None":
        """The shape, or None if it is left to `plan.resolve_mesh`."""
        return None if self.mesh_shape == "auto" else MeshShape(*self.mesh_shape)


class MeshShape(NamedTuple):
    """Devices along 'data' and along 'latent'."""

    data: int = 1
    latent: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.latent

    def __str__(self) -> str:
        return f"{self.data} x {self.latent}"


def shapes_of(n_devices: int) -> list[MeshShape]:
    """Every shape of exactly `n_devices` devices, by ascending data axis."""
    return [MeshShape(d, n_devices // d) for d in range(1, n_devices + 1) if n_devices % d == 0]


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays devices out as ('data', 'latent'), neighbours on the interconnect along 'latent'.

    Where devices form a torus, axes are laid along its dimensions, split or joined as needed; where
    they form several slices, 'data' runs across those.

    Args:
      shape: of the mesh.
      devices: to use; all that JAX sees, by default. In a single process, a mesh may be smaller
        than that, and takes the first ones.

    Raises:
      ValueError: there are fewer devices than the mesh asks for, or, with several processes,
        another number; or 'data' does not divide by the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    processes = len({device.process_index for device in devices})
    if len(devices) < shape.size or (processes > 1 and len(devices) != shape.size):
        fitting = ", ".join(f"({s.data}, {s.latent})" for s in shapes_of(len(devices)))
        raise ValueError(
            f"Mesh.mesh_shape = ({shape.data}, {shape.latent}) asks for {shape.size} devices, but "
            f"{len(devices)} are present in {processes} process(es); use one of {fitting}, or "
            f"'auto'"
        )
    if shape.size < len(devices):
        # Part of a torus need not be one: there is no topology to respect.
        grid = np.asarray(devices[: shape.size]).reshape(shape)
    elif (slices := count_slices(devices)) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape.data % slices == 0:
        within = (shape.data // slices, shape.latent)
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1), devices, allow_split_physical_axes=True
        )
    else:
        fitting = [s for s in shapes_of(len(devices)) if s.data % slices == 0]
        raise ValueError(
            f"Mesh.mesh_shape = ({shape.data}, {shape.latent}) would split latents across the "
            f"{slices} slices present; use one of {', '.join(map(str, map(tuple, fitting)))}, or "
            f"'auto'"
        )
    return Mesh(grid, (DATA, LATENT))


def subject_mesh(mesh: Mesh, shards: int) -> Mesh:
    """The devices of a mesh in the same order, `shards` neighbours along 'latent'.

    Raises:
      ValueError: the devices do not divide by `shards`.
    """
    if mesh.size % shards:
        raise ValueError(
            f"Harvest.subject_shards = {shards} does not divide the {mesh.size} devices of the mesh"
        )
    return Mesh(mesh.devices.reshape(-1, shards), (DATA, LATENT))


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Number of slices, whose devices share a fast interconnect; 1 where there is no such thing."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def shape_of(mesh: Mesh) -> MeshShape:
    """The shape of a mesh of this package."""
    return MeshShape(mesh.shape[DATA], mesh.shape[LATENT])


def check_divisible(shape: MeshShape, n_latents: int, batch_tokens: int) -> None:
    """Raises ValueError unless latents split over 'latent' and tokens over the whole mesh."""
    if n_latents % shape.latent:
        raise ValueError(
            f"SAE.n_latents = {n_latents} is not divisible by the {shape.latent} latent shards of "
            f"Mesh.mesh_shape = ({shape.data}, {shape.latent}); the next multiple is "
            f"{math.ceil(n_latents / shape.latent) * shape.latent}"
        )
    if batch_tokens % shape.size:
        raise ValueError(
            f"Train.batch_size = {batch_tokens} is not divisible by the {shape.size} devices of "
            f"Mesh.mesh_shape = ({shape.data}, {shape.latent}); the next multiple is "
            f"{math.ceil(batch_tokens / shape.size) * shape.size}"
        )


def _spec_of(path: tuple) -> P | None:
    """Partition of the leaf at a tree path, by its own name; None if the table has none."""
    name = getattr(path[-1], "key", getattr(path[-1], "name", None))
    return _SPECS.get(name)


def tree_specs(tree: Any) -> Any:
    """The `PartitionSpec` of every leaf of a state or parameter tree.

    Leaves named in the table are split as it says; scalars (counts, steps) are replicated.

    Raises:
      ValueError: an array of one or more dimensions has a name the table does not know.
    """

    def spec(path, leaf):
        found = _spec_of(path)
        if found is None and leaf.ndim > 0:
            raise ValueError(f"no partition is known for {jax.tree_util.keystr(path)}")
        return _REPLICATED if found is None else found

    return jax.tree_util.tree_map_with_path(spec, tree)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """`tree_specs` as shardings on `mesh`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), tree_specs(tree), is_leaf=lambda s: isinstance(s, P)
    )


def subject_sharding(mesh: Mesh, path: Sequence[Any], shape: Sequence[int]) -> NamedSharding:
    """Sharding of a subject model's parameter: split over 'latent', replicated over 'data'.

    Norms, positions, biases of what is summed, and whatever does not divide, are replicated.

    Args:
      mesh: the mesh.
      path: keys from the root of the parameter tree, as ('layers', 3, 'q', 'kernel').
      shape: of the parameter.
    """
    part = path[-2] if len(path) > 1 else path[-1]
    axis = _SUBJECT_AXIS.get(part)
    if axis == 0 and path[-1] == "bias":
        axis = None
    if axis is None or shape[axis] % mesh.shape[LATENT]:
        return NamedSharding(mesh, _REPLICATED)
    spec = [None] * len(shape)
    spec[axis] = LATENT
    return NamedSharding(mesh, P(*spec))


def token_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch `[B, D]`: rows over every device of the mesh."""
    return NamedSharding(mesh, _TOKENS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, _REPLICATED)


def subject_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a subject model's batch `[B, T]`: rows over 'data', the same for all 'latent'."""
    return NamedSharding(mesh, P(DATA, None))


def per_device(
    fn: Callable, mesh: Mesh, in_trees: Sequence[Any], out_trees: Sequence[Any] | str
) -> Callable:
    """`fn` on each device's own shards; collectives inside it name the axes DATA and LATENT.

    Args:
      fn: function of local arrays.
      mesh: the mesh.
      in_trees: one entry per argument: a tree of named arrays (see `tree_specs`), a name of the
        table, "tokens" for a batch, or "replicated".
      out_trees: the same for the outputs, or one entry for a single output.
    """

    def specs(tree):
        if isinstance(tree, str):
            return (_SPECS | {"tokens": _TOKENS, "replicated": _REPLICATED})[tree]
        return tree_specs(tree)

    # Replication is not inferred: collectives.py states every reduction.
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(specs(tree) for tree in in_trees),
        out_specs=specs(out_trees)
        if isinstance(out_trees, str)
        else tuple(specs(tree) for tree in out_trees),
        check_vma=False,
    )
