"""Compiles for a Hopper GPU that is not here, and reads what the GPU's assembler says of kernels.

Needs jax >= 0.11 and three wheels: `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt
nvidia-cuda-nvcc` (the first two of jax's own version). `require` skips a test without them.
"""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.lib import mosaic_gpu_dialect  # to read what JAX lowers kernels to
from jax.experimental import topologies
from jax.extend.mlir import ir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch

DEVICE_KIND = "NVIDIA H200"
MAX_REGISTERS = 255  # a thread's
MAX_SHARED_BYTES = 232_448  # a block's

_TARGET_CONFIG = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {MAX_SHARED_BYTES}
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{DEVICE_KIND}"
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic kernel, as compiled.

    Attributes:
      name: the Python function it was made of.
      registers: of a thread, at the kernel's start.
      spill_bytes: stored to and loaded from local memory because registers ran out.
      shared_bytes: of a block.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for one GPU.

    Attributes:
      kernels: its Mosaic kernels, each once.
      temp_bytes: peak of temporaries beside arguments and results.
      text: the optimized HLO.
    """

    kernels: tuple[Kernel, ...]
    temp_bytes: int
    text: str

    def assert_fits(self) -> None:
        """Every kernel keeps to a Hopper's limits without spilling; prints what it uses."""
        assert self.kernels, "no Mosaic kernel in the program"
        for kernel in self.kernels:
            print(kernel)
            assert kernel.spill_bytes == 0, kernel
            assert kernel.registers <= MAX_REGISTERS, kernel
            assert kernel.shared_bytes <= MAX_SHARED_BYTES, kernel


def require() -> None:
    """Skips the calling test, or module, where nothing can be compiled for a GPU."""
    if jax.__version_info__ < (0, 11):
        pytest.skip("Mosaic GPU needs jax >= 0.11", allow_module_level=True)
    pytest.importorskip("jax_plugins.xla_cuda13")
    toolkit = pytest.importorskip("nvidia.cu13")
    if not any((Path(folder) / "bin" / "ptxas").exists() for folder in toolkit.__path__):
        pytest.skip("needs ptxas (nvidia-cuda-nvcc)", allow_module_level=True)


def compile_for_gpu(function: Callable, *args: Any) -> Compiled:
    """Traces and compiles `function` for one H200.

    Args:
      function: takes arrays alone; close over the rest.
      *args: pytrees of `jax.ShapeDtypeStruct`.
    """
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver here to ask for its version
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    here = NamedSharding(Mesh(np.array(devices()), ("one",)), PartitionSpec())
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), args)
    with dispatch.target("gpu", DEVICE_KIND), _uncached():
        lowered = jax.jit(function).lower(*placed)
        with _standard_output() as log:
            compiled = lowered.compile()
    return Compiled(
        _kernels(lowered.compiler_ir(), log[0]),
        compiled.memory_analysis().temp_size_in_bytes,
        compiled.as_text(),
    )


def devices(count: int = 1) -> list[jax.Device]:
    """So many H200s of one host, to compile for."""
    return topologies.get_topology_desc(
        "", platform="cuda", topology=f"1x1x{count}", target_config=_TARGET_CONFIG
    ).devices


_SCATTER = re.compile(r"^\s.* = \(?(\w+)\[.*? scatter\(.*$", re.MULTILINE)


def unordered_scatters(text: str) -> list[str]:
    """Scatters of an optimized program whose result may depend on timing.

    Those that may name one place twice, unless they add up whole numbers, of which the order does
    not matter.
    """
    return [
        found[0].strip()
        for found in _SCATTER.finditer(text)
        if "unique_indices=true" not in found[0] and found[1][0] not in "su"
    ]


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Compiles anew, and leaves nothing behind: a cached program comes without figures."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def _standard_output() -> Iterator[list[str]]:
    """Collects what native code prints; the list holds it when the block ends."""
    log: list[str] = []
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield log
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            log.append(file.read().decode())


_ASSEMBLED = re.compile(
    r"Function properties for (\w+)_mosaic_gpu_kernel\n"
    r".*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers"
)

# By hash. A kernel met before is not assembled again by this process; nor need it be.
_KNOWN: dict[bytes, Kernel] = {}


def _kernels(module: ir.Module, log: str) -> tuple[Kernel, ...]:
    """The kernels of a lowered program, with the assembler's figures."""
    figures: dict[str, tuple[int, int]] = {}
    for name, stores, loads, registers in _ASSEMBLED.findall(log):
        # Of several kernels of one name, the worst speaks for all.
        most, spilled = figures.get(name, (0, 0))
        figures[name] = (max(most, int(registers)), max(spilled, int(stores) + int(loads)))
    found = {}
    for key, code in _kernel_modules(module):
        if key not in _KNOWN:
            name, shared_bytes = _name_and_shared_bytes(code)
            assert name in figures, f"the assembler says nothing of {name}:\n{log}"
            _KNOWN[key] = Kernel(name, *figures[name], shared_bytes)
        found[key] = _KNOWN[key]
    return tuple(found.values())


def _operations(module: ir.Module, name: str) -> list[ir.Operation]:
    found = []

    def visit(operation):
        if operation.name == name:
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def _kernel_modules(module: ir.Module) -> Iterator[tuple[bytes, bytes]]:
    """Hash and code of every call of a Mosaic GPU kernel."""
    for call in _operations(module, "stablehlo.custom_call"):
        if "mosaic_gpu" in str(call.attributes["call_target_name"]):
            config = call.attributes["mhlo.backend_config"]
            yield tuple(ir.StringAttr(config[key]).value_bytes for key in ("kernel_hash", "module"))


def _name_and_shared_bytes(code: bytes) -> tuple[str, int]:
    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        mosaic_gpu_dialect.register_dialect(context)
        module = ir.Module.parse(code)
        (launch,) = _operations(module, "stable_mosaic_gpu.gpu.launch")
        size = launch.operands[len(launch.operands) - 1].owner.attributes["value"]
        return ir.StringAttr(module.operation.attributes["sym_name"]).value, int(
            ir.IntegerAttr(size)
        )
