"""What was measured, as rows of a table and as JSON."""

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from pallas_kernels.bench.timing import Samples, median, ratio, spread
from pallas_kernels.shapes import Shape

# What a row's time is divided by, if it took part in the same repetitions, and the column.
RATIOS = {
    "encoder": "/encoder",
    "encoder in place": "/in place",
    "lax.top_k": "/lax.top_k",
    "dense step": "dense/",
    "saejax": "/saejax",
}
_INVERTED = ("dense step",)  # shown as the other's time over this one's
_LEGEND = """\
ms: median of the wall clock, and the distance of its quartiles. cpu ms: of all threads.
/encoder: time over that of x @ w.T of the same shape in the same run (cpu/encoder: of CPU times);
/in place: the same product written into memory that is there already. copy: least time that the
bytes could take at the speed of a copy in the same run, over the time; above 1 where rows that
many tokens share stay in caches. dense/: time of the dense autodiff step over this one's.
Ratios are medians over repetitions, in which all compared things take turns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation of one operation at one shape.

    Attributes:
      shape: its name.
      op, implementation: what was timed.
      samples: seconds.
      ratios, cpu_ratios: time over that of the thing named, by the clock and in CPU time.
      copy_share: see the legend; None where bytes do not tell.
      tokens_per_second: of the steps.
      memory: of the compiled program, bytes by kind.
      note: anything else that a reader must know.
    """

    shape: str
    op: str
    implementation: str
    samples: Samples
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    cpu_ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    copy_share: float | None = None
    tokens_per_second: float | None = None
    memory: dict[str, int] | None = None
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Everything, the samples included."""
        samples = {
            "median_ms": 1e3 * median(self.samples.wall),
            "spread_ms": 1e3 * spread(self.samples.wall),
            "median_cpu_ms": 1e3 * median(self.samples.cpu),
            "wall_ms": [round(1e3 * s, 6) for s in self.samples.wall],
            "cpu_ms": [round(1e3 * s, 6) for s in self.samples.cpu],
        }
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in fields.items() if k != "samples"} | samples


def ratios_to(
    samples: Samples, measured: Mapping[str, Samples]
) -> tuple[dict[str, float], dict[str, float]]:
    """Ratios to everything of `RATIOS` that was measured: by the clock, and in CPU time."""
    under = {name: measured[name] for name in RATIOS if name in measured}
    wall = {name: ratio(samples.wall, other.wall) for name, other in under.items()}
    return wall, {name: ratio(samples.cpu, other.cpu) for name, other in under.items()}


def environment() -> dict[str, Any]:
    """What the figures were measured on and with."""
    device = jax.devices()[0]
    return {
        "device": device_name(),
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_at_start": os.getloadavg()[0],
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def device_name() -> str:
    """The accelerator as JAX names it, or the processor as the system does."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def headline(about: Mapping[str, Any]) -> str:
    """The line above all tables."""
    return (
        f"{about['device']} ({about['platform']}, {about['cpus']} CPU cores, load "
        f"{about['load_at_start']:.1f} at the start), jax {about['jax']}, Python "
        f"{about['python']}, freed memory {'kept' if about['keep_memory'] else 'given back'}"
    )


def title(name: str, shape: Shape, dtype: str, buffers: int) -> str:
    """The line above a table."""
    return (
        f"{name}: d={shape.d} n={shape.n} k={shape.k} B={shape.tokens} k_aux={shape.k_aux}, "
        f"{dtype}, {buffers} sets of inputs"
    )


def table(rows: Sequence[Row]) -> str:
    """Rows with the columns that any of them fills."""
    shown = [name for name in RATIOS if any(name in row.ratios for row in rows)]
    copies = any(row.copy_share is not None for row in rows)
    rates = any(row.tokens_per_second is not None for row in rows)
    memory = any(row.memory is not None for row in rows)
    head = ["operation", "by", "ms", "+-", "cpu ms", *(RATIOS[name] for name in shown)]
    head += ["cpu/encoder"] * ("encoder" in shown)
    head += ["copy"] * copies + ["tokens/s"] * rates + ["peak MiB"] * memory
    lines = [head]
    for row in rows:
        numbers = (median(row.samples.wall), spread(row.samples.wall), median(row.samples.cpu))
        line = [row.op, row.implementation, *(_digits(1e3 * number) for number in numbers)]
        line += [_digits(_shown(row.ratios.get(name), name in _INVERTED)) for name in shown]
        line += [_digits(row.cpu_ratios.get("encoder"))] * ("encoder" in shown)
        line += [_digits(row.copy_share)] * copies
        line += [_thousands(row.tokens_per_second)] * rates
        line += [_mebibytes(row.memory)] * memory
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
    notes = [f"{row.op} {row.implementation}: {row.note}" for row in rows if row.note]
    return "\n".join([text, *notes])


def legend() -> str:
    """What the columns mean."""
    return _LEGEND


def write(path: pathlib.Path, about: Mapping[str, Any], rows: Sequence[Row], more: Any) -> None:
    """Writes everything as one JSON object."""
    content = {**about, "rows": [row.as_json() for row in rows], **more}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _shown(number: float | None, inverted: bool) -> float | None:
    return 1 / number if number and inverted else number


def _digits(number: float | None) -> str:
    if number is None:
        return "-"
    if abs(number) >= 1000:
        return f"{number:.0f}"
    return f"{number:.3g}" if abs(number) < 100 else f"{number:.1f}"


def _thousands(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _mebibytes(memory: Mapping[str, int] | None) -> str:
    return "-" if memory is None else f"{memory['peak'] / 2**20:,.0f}"
