"""The collectives of a step, what each should move, and how long the interconnect takes for it."""

import dataclasses
import math

from saejax.mesh import DATA, LATENT, MeshShape
from saejax.model.codes import gathered_arrays
from saejax.plan.hardware import Topology
from saejax.plan.hlo import Collective
from saejax.plan.workload import Workload
from saejax.train.loss import Selection
from saejax.train.step import auxk_block_tokens

SCOPES = (
    "auxk",
    "multi",
    "tokens",
    "candidates",
    "kept counts",
    "reconstruction",
    "residual",
    "codes over data",
    "gradients over data",
    "fired",
    "sums",
    "gradient norm",
)
"""Names that `collectives.py` and the step trace their collectives under, alone or two together."""

_BOTH = f"{DATA}, {LATENT}"
_TPU_TILE_ROWS = 8


def expected_collectives(work: Workload, *, largest_auxk: bool = False) -> list[Collective]:
    """Every collective of a step that moves more than scalars.

    Args:
      work: the step.
      largest_auxk: with all latents dead, rather than `DEAD_FRACTION` of them.
    """
    loss, matrix = work.spec.loss, work.matrix
    rows = [*_of_microbatch(work, "", loss.main, work.latents, tokens=True)]
    if loss.multi is not None:
        rows += _of_microbatch(work, "multi ", loss.multi, work.latents, tokens=False)
    block = work.auxk_blocks[1 if largest_auxk else 0]
    if block:
        rows += _of_auxk(work, block)
        rows.append(_one("auxk sums", "all-reduce", _BOTH, 3, 4 * (work.width + 2)))
        # Of few rows, so summed whichever way the main gradients go.
        size = 4 * block * (2 * work.width + 1)
        rows.append(_one("auxk gradients over data", "all-reduce", DATA, 3, size))
    if not loss.gather_codes:
        size = 4 * (2 * matrix + work.latents)
        rows.append(_one("gradients over data", "all-reduce", DATA, 3, size))
    rows.append(_one("fired", "all-reduce", DATA, 1, 4 * work.latents))
    rows.append(_one("sums", "all-reduce", _BOTH, 3, 4 * work.width + 28))
    sizes = {DATA: work.shape.data, LATENT: work.shape.latent}
    present = []
    for row in rows:
        axis = ", ".join(a for a in row.axis.split(", ") if sizes[a] > 1)
        if axis and row.bytes:
            present.append(dataclasses.replace(row, axis=axis))
    return present


def _one(name: str, kind: str, axis: str, calls: float, size: float) -> Collective:
    return Collective(name=name, kind=kind, axis=axis, calls=calls, bytes=size)


def _of_auxk(work: Workload, latents: int) -> list[Collective]:
    """AuxK's reconstructions from `latents` latents of each shard, the last blocks included."""
    shards, kind = work.shape.latent, work.topology.chip.kind
    own = work.block // shards
    size = auxk_block_tokens(own, shards, latents, platform=kind)
    found: dict[tuple[str, str], Collective] = {}
    for parts in ((own // size, size * shards), (1, own % size * shards)):
        wanted = work.spec.loss.aux
        for row in _of_microbatch(work, "auxk ", wanted, latents, tokens=True, parts=parts):
            same = found.get((row.name, row.kind), dataclasses.replace(row, calls=0, bytes=0))
            found[row.name, row.kind] = dataclasses.replace(
                row, calls=same.calls + row.calls, bytes=same.bytes + row.bytes
            )
    return list(found.values())


def _of_microbatch(
    work: Workload,
    prefix: str,
    wanted: Selection,
    latents: int,
    *,
    tokens: bool,
    parts: tuple[int, int] | None = None,
) -> list[Collective]:
    """One reconstruction from `latents` latents of each shard, over all microbatches.

    Of each so many parts of so many tokens are taken; None is all tokens at once.
    """
    chunks, shards = work.spec.chunks, work.shape.latent
    cuts, block = parts or (1, work.block)
    if not block:
        return []
    offered = min(wanted.capacity, latents)
    wide, narrow = block * work.width * 4, block * work.width * work.itemsize
    # Over the whole of a 3-d torus the TPU compiler sums where it could scatter, and where the
    # sides are closed to rings, also where it could gather. It sums, too, where each would be
    # scattered less than a tile.
    topology = work.topology
    whole = topology.chip.torus == 3 and shards == topology.devices
    partial = topology.chip.kind == "tpu" and block // shards < _TPU_TILE_ROWS
    scatter = "all-reduce" if whole or partial else "reduce-scatter"
    gather = "all-reduce" if whole and topology.closed else "all-gather"
    rows = [("tokens", gather, narrow)] if tokens else []
    if shards * offered > wanted.k:
        if work.spec.loss.exchange == "all_gather" or block % shards:
            rows += [("candidates", "all-gather", block * shards * offered * 4)]
        else:
            rows += [("candidates", "all-to-all", block * offered * 4)]
            rows += [("kept counts", "all-to-all", block * 4)]
    rows += [("reconstruction", scatter, wide), ("residual", gather, narrow)]
    calls = chunks * cuts
    found = [_one(prefix + n, kind, LATENT, calls, calls * size) for n, kind, size in rows]
    if work.spec.loss.gather_codes and prefix != "auxk ":
        arrays, code = _code(work, wanted, offered)
        size = chunks * work.shape.data * (code + 2 * narrow)
        calls = (arrays + 2) * chunks
        found.append(_one(f"{prefix}codes over data", "all-gather", DATA, calls, size))
    return found


def _code(work: Workload, wanted: Selection, offered: int) -> tuple[int, int]:
    """Arrays and bytes of the codes of a microbatch on a shard: values, derivatives, and where."""
    below = work.spec.loss.dense_below
    arrays, size = gathered_arrays(wanted.k, offered, work.latents, work.shape.latent, below)
    return arrays, size * work.block


def seconds(one: Collective, topology: Topology, shape: MeshShape) -> float:
    """Time of a collective at the rate of the links, all calls, nothing overlapped.

    A ring moves (p - 1) / p of the full array over each device's links, an all-reduce twice that.
    """
    over = one.axis.split(", ")
    members = math.prod({DATA: shape.data, LATENT: shape.latent}[a] for a in over if a)
    share = (members - 1) / members if members else 0.0
    passes = 2 if one.kind == "all-reduce" else 1
    return passes * share * one.bytes / bandwidth(over, topology, shape)


def bandwidth(axes: list[str], topology: Topology, shape: MeshShape) -> float:
    """Bytes per second into each device from the others along these axes of the mesh."""
    chip = topology.chip
    members = math.prod({DATA: shape.data, LATENT: shape.latent}[a] for a in axes if a)
    if chip.kind == "tpu":
        # Both directions of every dimension of the torus that the axes take whole, one at least.
        whole = math.log(max(topology.devices, 2))
        taken = max(int(len(topology.sides or (1,)) * math.log(max(members, 1)) / whole + 1e-9), 1)
        return taken * chip.link * (2 if topology.closed else 1)
    if chip.kind == "cpu" or topology.devices <= chip.host:
        return chip.link
    # 'latent' lies within hosts first. A ring enters and leaves each host once, however many of its
    # members are there, and the rings of a host share its adapters, one a GPU, in equal parts: as
    # many adapters to a ring as it has members on the host.
    if axes == [LATENT]:
        neighbours = min(shape.latent, chip.host)
    else:
        neighbours = chip.host if LATENT in axes else max(chip.host // shape.latent, 1)
    if members <= neighbours:
        return chip.link
    return min(chip.link, chip.network * neighbours)
