"""What hardware offers a step, from public data sheets, and the names that a plan knows it by."""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Literal

import jax

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them: a TPU chip (or one of its two cores), a GPU, a CPU.

    Attributes:
      name: as a topology names it.
      kind: of the accelerator.
      memory: bytes that a program may use, of the device's own memory.
      bf16_flops, f32_flops: peak rate of products, operations per second (float32 in full).
      bandwidth: of that memory, bytes per second.
      link: bytes per second, one way, of a TPU's link to one neighbour, or from a GPU to the others
        of its host.
      network: bytes per second, one way, from a GPU to other hosts; 0 for a TPU.
      torus: dimensions of a TPU's interconnect; 0 for others.
      wraps: a TPU axis of this length or more is closed to a ring, which doubles its bandwidth.
      host: GPUs on a host; 1 for others.
      per_chip: devices per TPU chip.
    """

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    memory: int
    bf16_flops: float
    f32_flops: float
    bandwidth: float
    link: float
    network: float = 0.0
    torus: int = 0
    wraps: int = 4
    host: int = 1
    per_chip: int = 1

    @property
    def dtype(self) -> str:
        """What `SAE.compute_dtype = 'auto'` means there."""
        return "float32" if self.kind == "cpu" else "bfloat16"


def _tpu(name: str, gib: float, bf16: float, bandwidth: float, link: float, torus: int, **more):
    # A float32 product at full precision takes six passes of the bfloat16 matrix unit.
    return Chip(
        name=name,
        kind="tpu",
        memory=int(gib * _GIB),
        bf16_flops=bf16,
        f32_flops=bf16 / 6,
        bandwidth=bandwidth,
        link=link,
        torus=torus,
        **more,
    )


def _gpu(name: str, gb: float, bf16: float, f32: float, bandwidth: float, link: float, net: float):
    return Chip(
        name=name,
        kind="gpu",
        memory=int(gb * 1e9),
        bf16_flops=bf16,
        f32_flops=f32,
        bandwidth=bandwidth,
        link=link,
        network=net,
        host=8,
    )


# TPUs: cloud.google.com/tpu/docs (system architecture pages), and for the usable 90 % of each link
# "How To Scale Your Model" (jax-ml.github.io/scaling-book). Memory is the limit that the compiler
# itself enforces. A v4 or tpu7x chip shows as two devices, each with half of the chip.
# GPUs: NVIDIA's data sheets of the SXM modules, dense rates, float32 without tensor cores; NVLink
# at 80 % and one 200 or 400 Gbit/s adapter a GPU at 85 %. Memory is 94 % of what is soldered on.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 15.25, 137.5e12, 614e9, 22.5e9, 3, per_chip=2),
        _tpu("v5e", 15.75, 197e12, 819e9, 45e9, 2, wraps=16),
        _tpu("v5p", 95.74, 459e12, 2765e9, 90e9, 3),
        _tpu("v6e", 31.25, 918e12, 1640e9, 90e9, 2, wraps=16),
        _tpu("tpu7x", 94.75, 1153e12, 3690e9, 45e9, 3, per_chip=2),
        _gpu("A100", 75, 312e12, 19.5e12, 2039e9, 240e9, 21e9),
        _gpu("H100", 75, 989e12, 67e12, 3350e9, 360e9, 42.5e9),
        _gpu("H200", 132, 989e12, 67e12, 4800e9, 360e9, 42.5e9),
        _gpu("B200", 169, 2250e12, 75e12, 8000e9, 720e9, 42.5e9),
        # Nobody's in particular: a plan for forced CPU devices ranks, it does not time.
        Chip(
            name="cpu",
            kind="cpu",
            memory=0,
            bf16_flops=1e11,
            f32_flops=1e11,
            bandwidth=2e10,
            link=5e9,
        ),
    )
}

_CHIP_OF = {name.lower(): chip for name, chip in CHIPS.items()}

# Part of `Device.device_kind` -> chip, the more special name first.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
    "TPU v5": "v5p",
    "TPU v4": "v4",
    "A100": "A100",
    "H100": "H100",
    "H200": "H200",
    "B200": "B200",
}

_TPU_SIDES = {2: "16x16", 3: "8x8x8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices of one kind and how they are connected.

    Attributes:
      name: as it was asked for.
      chip: every device of it.
      devices: how many.
      sides: chips along each dimension of a TPU's torus; empty for others.
    """

    name: str
    chip: Chip
    devices: int
    sides: tuple[int, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether every side of the torus is a ring."""
        return min(self.sides, default=0) >= self.chip.wraps


def parse_topology(text: str) -> Topology:
    """The topology that a flag names.

    Args:
      text: 'v5p:8x8x8' (a TPU and the sides of its slice), 'gpu:H100x512', or 'cpu:8'; in capitals
        or not.

    Raises:
      ValueError: the text has another form, or the chip is not known.
    """
    kind, _, size = text.strip().lower().partition(":")
    gpu = re.fullmatch(r"(\w+?)x([1-9]\d*)", size) if kind == "gpu" else None
    chip = _CHIP_OF.get(gpu[1] if gpu else kind)
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return Topology(name=f"cpu:{size}", chip=chip, devices=int(size))
    if gpu and chip is not None and chip.kind == "gpu":
        name = f"gpu:{chip.name}x{gpu[2]}"
        return Topology(name=name, chip=chip, devices=int(gpu[2]))
    sized = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size)
    if gpu or chip is None or chip.kind != "tpu" or not sized:
        raise _unknown(text)
    sides = tuple(int(side) for side in size.split("x"))
    if len(sides) != chip.torus:
        raise ValueError(
            f"--topology={text}: a slice of {kind} has {chip.torus} sides, as in "
            f"{kind}:{_TPU_SIDES[chip.torus]}; {size} has {len(sides)}"
        )
    name = f"{chip.name}:{size}"
    return Topology(name=name, chip=chip, devices=math.prod(sides) * chip.per_chip, sides=sides)


def _unknown(text: str) -> ValueError:
    """Names what is known, and what is nearest to what was asked for."""
    tpus = [f"{c.name}:{_TPU_SIDES[c.torus]}" for c in CHIPS.values() if c.kind == "tpu"]
    gpus = [c.name for c in CHIPS.values() if c.kind == "gpu"]
    examples = [*tpus, *(f"gpu:{name}x512" for name in gpus), "cpu:8"]
    near = difflib.get_close_matches(text.lower(), [e.lower() for e in examples], n=1)
    meant = next((f"; did you mean {e}?" for e in examples if e.lower() in near), "")
    return ValueError(
        f"--topology={text} is not known{meant or '.'} Allowed: a TPU and the sides of its slice "
        f"({', '.join(tpus)}, or other sides), gpu:<chip>x<count> with chip {', '.join(gpus)} "
        f"(gpu:H100x512), or cpu:<count> (cpu:8)"
    )


def topology_of(devices: Sequence[jax.Device]) -> Topology | None:
    """What these devices are, for a plan; None where the kind is not one that it knows."""
    first = devices[0]
    if first.platform == "cpu":
        return Topology(name=f"cpu:{len(devices)}", chip=CHIPS["cpu"], devices=len(devices))
    name = next((n for part, n in _KINDS.items() if part in first.device_kind), None)
    if name is None:
        return None
    sides = ()
    if getattr(first, "coords", None) is not None:
        columns = zip(*(d.coords for d in devices))
        sides = tuple(max(column) - min(column) + 1 for column in columns)
        sides = sides[: CHIPS[name].torus]
    return Topology(name=f"{name}, {len(devices)} present", chip=CHIPS[name], devices=len(devices),
                    sides=sides)  # fmt: skip


def only_cpus(text: str, *, dry_run: bool = True) -> None:
    """Keeps this process from the accelerators that are present: a plan is for absent ones.

    To be called before anything asks JAX for a device.

    Args:
      text: the topology, see `parse_topology`.
      dry_run: whether a plan is all that is asked for.

    Raises:
      ValueError: the topology is not known, or there is more to do than to plan; or JAX started
        already, with fewer CPU devices than the topology has.
    """
    if not dry_run:
        raise ValueError(f"--topology={text} plans and does not run: add --dry_run")
    topology = parse_topology(text)
    wanted = topology.devices if topology.chip.kind == "cpu" else 1
    try:
        jax.config.update("jax_platforms", "cpu")
        if jax.config.jax_num_cpu_devices < wanted:
            jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError as error:
        if len(jax.devices("cpu")) < wanted:
            raise ValueError(
                f"--topology={topology.name}: JAX started already with "
                f"{len(jax.devices('cpu'))} CPU devices; plan in a process of its own"
            ) from error
