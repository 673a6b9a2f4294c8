"""What is said when another process is gone."""

import contextlib
import re
from collections.abc import Iterator

from saejax.processes.group import count, index

# What JAX says when another process is gone: in its JaxRuntimeError; and in the ValueError that a
# failure of Gloo is, raised by C++ without a frame of JAX, but led by the name of a status.
_LOST = re.compile(
    r"(?i)gloo [\w -]+ (failed|error)|nccl (operation|error)\b|\bunavailable: |socket closed|"
    r"connection (closed by|reset)|heartbeat|tasks have crashed|barrier (failed|timed out)|"
    r"coordination ?service"
)
_GLOO = re.compile(r"[A-Z_]+: (.*: )?Gloo [\w -]+ failed: ")

GONE = (
    "lost another process, which ended or cannot be reached; its own last message says why. Start "
    "all of them again: the same command continues from the last checkpoint"
)


class LostError(ConnectionError):
    """A process that is not there, or not any more: the program ends with `exits.STUCK`."""


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Turns what JAX says when another process is gone into a LostError of one line."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        of_jax = isinstance(error, jax.errors.JaxRuntimeError)
        if count() == 1 or not (_LOST.search if of_jax else _GLOO.match)(str(error)):
            raise
        first = str(error).strip().splitlines()[0]
        raise LostError(f"process {index()} of {count()} {GONE} ({first})") from error
