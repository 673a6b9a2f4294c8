"""Timing of things that take turns, and the figures that are made of it."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

WARM_UP = 2


class Run(NamedTuple):
    """One thing to time.

    Attributes:
      call: what is timed, given the number of the repetition; arrays it returns are waited for.
      before: what precedes it untimed.
    """

    call: Callable[[int], Any]
    before: Callable[[int], None] | None = None


class Samples(NamedTuple):
    """Seconds of every repetition.

    Attributes:
      wall: of the clock.
      cpu: of all threads of this process; what a busy machine disturbs least.
    """

    wall: np.ndarray
    cpu: np.ndarray

    def minus(self, other: "Samples") -> "Samples":
        """What this took beyond another thing of the same repetitions."""
        return Samples(self.wall - other.wall, self.cpu - other.cpu)


def alternate(runs: Mapping[str, Run], repeats: int, *, pause: float = 0.0) -> dict[str, Samples]:
    """Times several things in turns: in every repetition each of them once.

    Each repetition starts with another one, so that none always follows the same neighbour.

    Args:
      runs: by name.
      repeats: repetitions, after two that warm up.
      pause: seconds between two things, for threads that spin after their work.
    """
    names = list(runs)
    seconds = {name: ([], []) for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(-WARM_UP, repeats):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                wall, cpu = _time(runs[name], i + WARM_UP)
                if i >= 0:
                    seconds[name][0].append(wall)
                    seconds[name][1].append(cpu)
                if pause:
                    time.sleep(pause)
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(*map(np.asarray, lists)) for name, lists in seconds.items()}


def _time(run: Run, i: int) -> tuple[float, float]:
    if run.before is not None:
        run.before(i)
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(run.call(i))
    return time.perf_counter() - wall, time.process_time() - cpu


def median(seconds: np.ndarray) -> float:
    """The middle one."""
    return float(np.median(seconds))


def spread(seconds: np.ndarray) -> float:
    """Interquartile range."""
    low, high = np.quantile(seconds, [0.25, 0.75])
    return float(high - low)


def ratio(over: np.ndarray, under: np.ndarray) -> float:
    """Median of the ratios within repetitions: both halves saw the same moment of the machine."""
    return float(np.median(over / np.maximum(under, 1e-9)))
