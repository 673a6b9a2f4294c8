"""Kernels for TPUs in Pallas's interpreter: late copies, poisoned memory, detected races."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # holds the verdict on races
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch


def interpreter(op: Callable, static_argnums: tuple[int, ...] = ()) -> Callable:
    """`op` by its kernel; copies happen when waited for, as late as they may.

    Compiled once for all calls. A call fails where a read or write was not ordered with another.
    """
    named = functools.partial(op, implementation="mosaic_tpu")
    jitted = jax.jit(named, static_argnums=static_argnums)

    def call(*args: Any, **kwargs: Any) -> Any:
        interpreting = dispatch.interpreting(detect_races=True, dma_execution_mode="on_wait")
        with interpreting, _clean():
            out = jax.block_until_ready(jitted(*args, **kwargs))
            races = interpret_pallas_call.races
            assert races is not None and not races.races_found
        return out

    return call


def interpreted(op: Callable, *args: Any, **kwargs: Any) -> Any:
    """One call by `interpreter`; whole numbers are static."""
    static = tuple(i for i, arg in enumerate(args) if isinstance(arg, int))
    return interpreter(op, static)(*args, **kwargs)


@contextlib.contextmanager
def _clean() -> Iterator[None]:
    """A kernel that fails leaves the state of its interpreter behind."""
    pltpu.reset_tpu_interpret_mode_state()
    try:
        yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()
