"""The device mesh and the one table from array name to `PartitionSpec`.

Axes: 'data' splits tokens, 'latent' splits latents. Tokens enter split over the whole mesh, so
that every device is fed its own rows. One device is the 1 x 1 mesh and runs the same code.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
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
}
_TOKENS = P((DATA, LATENT), None)
_REPLICATED = P()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Shape of the device mesh.

    Attributes:
      data: devices along 'data'; each group sees its own tokens and holds all latents.
      latent: devices along 'latent'; each holds n_latents / latent rows of both matrices.
    """

    data: int = 1
    latent: int = 1

    def __post_init__(self):
        for field in ("data", "latent"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)} must be at least 1")

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.latent


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the first `config.size` devices out as ('data', 'latent').

    Raises:
      ValueError: there are fewer devices than the mesh asks for.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) < config.size:
        raise ValueError(
            f"Mesh.data x Mesh.latent = {config.data} x {config.latent} asks for {config.size} "
            f"devices, but {len(devices)} are present; use a smaller mesh"
        )
    if len(devices) == config.size:
        return jax.make_mesh(
            (config.data, config.latent),
            (DATA, LATENT),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
            devices=devices,
        )
    grid = np.asarray(devices[: config.size]).reshape(config.data, config.latent)
    return Mesh(grid, (DATA, LATENT))


def check_divisible(config: MeshConfig, n_latents: int, batch_tokens: int) -> None:
    """Raises ValueError unless latents split over 'latent' and tokens over the whole mesh."""
    if n_latents % config.latent:
        raise ValueError(
            f"SAE.n_latents = {n_latents} is not divisible by Mesh.latent = {config.latent}; "
            f"the next multiple is {math.ceil(n_latents / config.latent) * config.latent}"
        )
    if batch_tokens % config.size:
        raise ValueError(
            f"Train.batch_size = {batch_tokens} is not divisible by the mesh's {config.size} "
            f"devices; the next multiple is "
            f"{math.ceil(batch_tokens / config.size) * config.size}"
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


def token_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch `[B, D]`: rows over every device of the mesh."""
    return NamedSharding(mesh, _TOKENS)


def per_device(
    fn: Callable, mesh: Mesh, in_trees: Sequence[Any], out_trees: Sequence[Any]
) -> Callable:
    """`fn` on each device's own shards; collectives inside it name the axes DATA and LATENT.

    Args:
      fn: function of local arrays.
      mesh: the mesh.
      in_trees: one entry per argument: a tree of named arrays (see `tree_specs`), a name of the
        table, "tokens" for a batch, or "replicated".
      out_trees: the same for the outputs.
    """

    def specs(tree):
        if isinstance(tree, str):
            return (_SPECS | {"tokens": _TOKENS, "replicated": _REPLICATED})[tree]
        return tree_specs(tree)

    # Replication is not inferred: collectives.py states every reduction and its gradient.
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(specs(tree) for tree in in_trees),
        out_specs=tuple(specs(tree) for tree in out_trees),
        check_vma=False,
    )
