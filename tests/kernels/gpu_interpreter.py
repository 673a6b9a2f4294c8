"""Kernels for GPUs in Pallas's interpreter: poisoned memory, detected races."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest

from pallas_kernels import dispatch

if jax.__version_info__ < (0, 11):
    pytest.skip("the interpreter of Mosaic GPU needs jax >= 0.11", allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # holds the verdict on races


def interpreted(op: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls an operation by its kernel.

    Raises:
      AssertionError: a read or write was not ordered with another.
    """
    call = functools.partial(op, implementation="mosaic_gpu", **kwargs)
    with dispatch.interpreting(detect_races=True), _clean():
        static = [i for i, arg in enumerate(args) if isinstance(arg, int)]
        out = jax.block_until_ready(jax.jit(call, static_argnums=static)(*args))
        assert not gpu_callbacks.get_races().races_found
    return out


@contextlib.contextmanager
def _clean():
    """A kernel that fails leaves the state of its interpreter behind."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        yield
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
