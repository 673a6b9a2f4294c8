"""The processes that have joined, and the store of keys and values that they share."""

import importlib
from typing import Any

# JAX is imported inside functions: a process is forked here, which threads would not survive.


class PreemptedError(KeyboardInterrupt):
    """SIGTERM while process 0 acts for all: the program ends with `exits.PREEMPTED`."""


class Group:
    """The state of this process among the others; there is one."""

    steps = 0
    """Calls of `lead` and `meet` so far, the same in every process."""
    ending = False
    """Every process is known to end."""
    leading = False
    """This process acts, in `lead`, and others wait."""
    preempted = False
    """SIGTERM came meanwhile."""


def count() -> int:
    """Number of processes."""
    import jax

    return jax.process_count()


def index() -> int:
    """This process; 0 leads: it writes what there is one of, and prints progress."""
    import jax

    return jax.process_index()


def client() -> Any:
    """The client of the coordination service; None for a process that has joined no others."""
    # No public function waits without using the devices, whose collectives may time out.
    try:
        return importlib.import_module("jax._src.distributed").global_state.client
    except (ImportError, AttributeError) as error:
        lack = "this jax has no jax._src.distributed.global_state.client, by which processes wait"
        raise RuntimeError(f"{lack}; install a version in the range of setup.py") from error


def value_of(key: str, seconds: float) -> str | None:
    """The value of a key, for which it waits; None if there is none after so long."""
    import jax

    try:
        return client().blocking_key_value_get(key, max(int(seconds * 1000), 1))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None
