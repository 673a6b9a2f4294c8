"""The training step compiled ahead of time for a topology that is not there."""

import dataclasses
import importlib.util
import os
import re
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from saejax import mesh as mesh_lib
from saejax.mesh import MeshShape
from saejax.model.normalizer import Normalizer
from saejax.plan.hardware import Topology
from saejax.plan.hlo import Collective, Program, Unreadable
from saejax.plan.traffic import SCOPES
from saejax.recipe import Recipe
from saejax.train import state as state_lib
from saejax.train.step import jit_step, make_step

BATCH_DTYPE = jnp.bfloat16
"""Of the activations as they are fed: stores hold bfloat16."""

# Without them the TPU compiler looks for a TPU machine around it, and two processes that compile
# at a time collide on a lock file. None of them restricts the topology.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

# What the GPU compiler asks a GPU for, where there is none.
_GPU_TARGETS = {
    "H100": """
        gpu_device_info {
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
          shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
          device_memory_size: 84929347584 registers_per_core_limit: 65536
          registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
        }
        platform_name: "CUDA"
        dnn_version_info { major: 9 minor: 12 }
        runtime_version { major: 13 minor: 0 patch: 0 }
        device_description_str: "NVIDIA H100 80GB HBM3"
    """,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a step, per device.

    Attributes:
      arguments: bytes of state and batch.
      temporaries: bytes of everything in between.
      peak: arguments, temporaries, and outputs that take no argument's place.
      live: bytes at the fullest moment, by the compiler's own account. On a TPU it is less than
        `peak`: a step of 114 GiB by the sum and 86 by this was accepted for 95.7 GiB.
      collectives: of the program; None if they could not be read.
      unread: why not; empty if they were.
      seconds: that compiling took.
    """

    arguments: int
    temporaries: int
    peak: int
    live: int
    collectives: list[Collective] | None
    unread: str
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """The compiler found the program too large for the memory of a device.

    Attributes:
      needed, available: as the compiler wrote them, '108.9G' say; empty if it did not.
    """

    needed: str
    available: str


def devices_of(topology: Topology) -> list[jax.Device] | None:
    """Devices of a topology to compile for; None where no compiler for it is installed.

    Raises:
      ValueError: the compiler knows no such slice.
    """
    if topology.chip.kind == "cpu":
        return jax.devices("cpu")[: topology.devices]
    if topology.chip.kind == "gpu":
        return _gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        return None
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {}
    if topology.devices == topology.chip.per_chip:  # hosts of one chip, not of four
        options = {"chips_per_host_bounds": (1, 1, 1)}
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except Exception as error:  # of several types, from the compiler
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--topology={topology.name}: the TPU compiler knows no such slice ({reason}); sides "
            f"are as in v5p:4x4x4, v5p:8x8x8, v5e:4x4, v6e:16x16"
        ) from error
    return list(description.devices)


def why_not_compiled(topology: Topology) -> str:
    """What is missing where `devices_of` has none."""
    name, host = topology.chip.name, topology.chip.host
    if topology.chip.kind == "gpu" and name not in _GPU_TARGETS:
        return f"no compiler for {name} is known (of GPUs, for {', '.join(_GPU_TARGETS)})"
    if topology.chip.kind == "gpu" and topology.devices > host and topology.devices % host:
        return f"{topology.devices} GPUs do not fill hosts of {host}, for which programs compile"
    extra = "tpu" if topology.chip.kind == "tpu" else "cuda13"
    return f"no compiler for {name} is installed (pip install .[{extra}])"


def _gpus(topology: Topology) -> list[jax.Device] | None:
    """GPUs to compile for: of one chip, where the plugin is there, and hosts are full."""
    count, host = topology.devices, topology.chip.host
    plugins = [importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)]
    if (
        topology.chip.name not in _GPU_TARGETS
        or not any(plugins)
        or (count > host and count % host)
    ):
        return None
    hosts = max(count // host, 1)
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.chip.name,
        target_config=_GPU_TARGETS[topology.chip.name],
        topology=f"1x{hosts}x{count // hosts}",
    )
    return list(description.devices)


def compile_step(
    recipe: Recipe, devices: list[jax.Device], shape: MeshShape, expected: list[Collective]
) -> Compiled | Refused:
    """Compiles the step of a recipe for these devices; nothing is allocated on any.

    Args:
      recipe: what to train; its microbatch is used as it is.
      devices: from `devices_of`.
      shape: of the mesh.
      expected: the collectives that the plan expects; see `Program.collectives`.
    """
    mesh = mesh_lib.make_mesh(shape, devices)
    train = recipe.train
    step = make_step(
        recipe.sae,
        recipe.loss,
        recipe.optimizer,
        recipe.topk,
        Normalizer(kind=recipe.sae.normalization),
        mesh,
        batch_tokens=train.batch_size,
        chunks=train.chunks(shape),
        steps=train.steps,
        data_exchange=recipe.mesh.data_exchange,
        kernels=recipe.kernels,
    )
    state = state_lib.abstract_state(recipe.sae, recipe.optimizer, train.steps)
    batch = jax.ShapeDtypeStruct((train.batch_size, recipe.sae.d_model), BATCH_DTYPE)
    began = time.monotonic()
    try:
        compiled = jit_step(step, state, mesh).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(str(error))
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    collectives, unread = None, ""
    try:
        collectives = Program(compiled.as_text(), shape, SCOPES).collectives(expected)
    except Unreadable as error:  # of a compiler that writes otherwise; memory is known all the same
        unread = str(error)
    peak = arguments + memory.temp_size_in_bytes + new
    return Compiled(
        arguments=arguments,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        live=memory.peak_memory_in_bytes or peak,
        collectives=collectives,
        unread=unread,
        seconds=time.monotonic() - began,
    )


def _refused(message: str) -> Refused:
    found = re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?)", message) or re.search(
        r"\(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)", message
    )
    return Refused(needed=found[1] if found else "", available=found[2] if found else "")
