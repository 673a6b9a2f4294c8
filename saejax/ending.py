"""How the program ends: what is raised becomes one line on stderr and a code of `exits.py`."""

import sys
from collections.abc import Callable

from saejax import exits, messages, processes


def code_of(work: Callable[[], int], *, debug: bool = False) -> int:
    """Runs `work`.

    Args:
      work: returns the exit code.
      debug: let errors of the user pass, for their traceback.

    Returns:
      Its code, or that of what it raised. What nobody expects to be raised is.
    """
    try:
        return work()
    except processes.PreemptedError:
        print("saejax: interrupted by SIGTERM; the same command continues", file=sys.stderr)
        return exits.PREEMPTED
    except KeyboardInterrupt:
        print("saejax: interrupted; the same command continues", file=sys.stderr)
        return exits.INTERRUPTED
    except (ValueError, OSError, FloatingPointError, NotImplementedError) as error:
        if debug:
            raise
        print(f"saejax: error: {messages.one_line(error)}", file=sys.stderr)
        return exits.STUCK if isinstance(error, processes.LostError) else exits.ERROR
