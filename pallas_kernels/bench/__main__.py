"""Command line of the benchmarks; `--help` explains it."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.bench import measure, race, report, settings, trainers
from pallas_kernels.bench.report import Row
from pallas_kernels.bench.settings import Settings
from pallas_kernels.shapes import NAMED, Shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit status."""
    chosen = settings.parse(arguments)
    if chosen is None:
        return 0
    if chosen.against:
        missing = trainers.missing(chosen.against)
        if missing:
            print(f"error: {missing}", file=sys.stderr)
            return 2
        # torch needs its share of the device's memory, of which JAX would take three quarters.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    kept = chosen.keep_memory and _keep_memory()
    about = report.environment() | {
        "repeats": chosen.repeats,
        "dtype": measure.dtype_of(chosen),
        "keep_memory": kept,
    }
    print(report.headline(about), report.legend(), sep="\n", flush=True)
    rows: list[Row] = []
    races: list[dict[str, Any]] = []
    for name, shape in (chosen.shapes or _suitable(chosen)).items():
        if chosen.ops:
            rows += measure.shape_rows(name, shape, chosen)
        if chosen.against:
            of_race, result = race.run(name, shape, chosen)
            rows += of_race
            races.append(result)
        if chosen.json is not None:  # after every shape, so that what was measured is kept
            report.write(chosen.json, about, rows, {"races": races})
    return 0


def _keep_memory() -> bool:
    """What `saejax.main` does first; before JAX starts its threads. True if it took effect."""
    from saejax.allocator import keep_freed_memory

    return keep_freed_memory()


def _suitable(chosen: Settings) -> dict[str, Shape]:
    """The shape to measure where none was named."""
    on_cpu = jax.default_backend() == "cpu"
    name = ("cpu_race" if chosen.against else "cpu") if on_cpu else "gpt2_32k"
    return {name: NAMED[name]}


if __name__ == "__main__":
    sys.exit(main())
