"""A program of several processes: each a child that works and a parent that watches it.

JAX aborts a process that has lost another one from C++, with a stack trace and without a word to
Python. So the parent passes the child's output on, puts one line in the place of that trace, and
returns its exit code. A process alone has no parent, and gets the handlers of signals only.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable

from saejax import exits
from saejax.processes.barriers import LeaderError
from saejax.processes.group import Group, PreemptedError, index
from saejax.processes.joining import missing
from saejax.processes.losses import GONE
from saejax.processes.settings import Settings, settings

FATAL = "Terminating process because the JAX distributed service detected fatal errors"
_NOISE = re.compile(r"[IWE]\d{4} .*(coordination|distributed|gloo)", re.I)  # what leads up to it
_OURS, _PREFIX = "saejax: ", "saejax: error: "
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def leave(number: int, frame: object) -> None:
    """The handler of SIGTERM outside training, where nothing has to be finished.

    No exception, which libraries may swallow or turn into one of their own; except where process 0
    acts for all: the others are waiting for its word.
    """
    if Group.leading:
        Group.preempted = True
        raise PreemptedError
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, b"saejax: interrupted by SIGTERM; the same command continues\n")
    os._exit(exits.PREEMPTED)


def watched(work: Callable[[], int], *, verbose: bool = False) -> int:
    """Runs `work`, the whole of a program; among several processes, in a child that is watched.

    Call it before JAX is imported: it forks.

    Args:
      work: returns the exit code; calls `join` before it uses a device. SIGTERM ends it (`leave`),
        unless it handles that signal.
      verbose: pass on everything that JAX prints about lost processes.

    Returns:
      The exit code of `work`; `exits.STUCK` if JAX aborted it because it lost another process;
      `exits.PREEMPTED` if SIGTERM ended it, 128 + n if another signal n did.
    """
    found = None
    with contextlib.suppress(ValueError):  # `join` raises it, where errors are expected
        found = settings(os.environ)
    if found is None:
        signal.signal(signal.SIGTERM, leave)
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    # A signal that comes before the parent can forward it waits until it can.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child:
        os.close(writing)
        return _watch(child, reading, found, verbose)
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent alone, which forwards it once
    signal.signal(signal.SIGTERM, leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    with contextlib.suppress(OSError, AttributeError):  # a killed parent takes it along, on Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if not verbose:  # Gloo prints its connections to stdout
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return _work(work)


def _work(work: Callable[[], int]) -> int:
    """Runs `work` and leaves the others such that they neither hang nor are surprised."""
    try:
        code = work()
    except LeaderError:
        code = exits.ERROR
    except PreemptedError:
        code = exits.PREEMPTED
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else exits.ERROR
    except BaseException:
        traceback.print_exc()
        code = exits.ERROR
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return code
    if Group.ending:
        with contextlib.suppress(RuntimeError):  # one that is gone already is no matter now
            jax.distributed.shutdown()
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    if index() == 0:
        time.sleep(1)  # the others abort when the coordinator is gone: let them say their own error
    os._exit(code or exits.ERROR)  # a regular exit waits for all of them


def _watch(child: int, reading: int, found: Settings, verbose: bool) -> int:
    def forward(number, _):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    before = {name: signal.signal(name, forward) for name in _FORWARDED}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    try:
        fatal, explained = _pass_on(reading, verbose)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for item in before.items():
            signal.signal(*item)
    if status >= 0:
        return status
    by = signal.Signals(-status)
    if fatal is not None:
        text = _PREFIX + (missing(found) if "RegisterTask" in fatal else f"{found} {GONE}")
    elif by in _FORWARDED:  # the same line in all that were interrupted
        text = f"saejax: interrupted by {by.name}; the same command continues"
    else:
        text = f"{_PREFIX}{found} was ended by {by.name}"
        text += " (out of memory?)" if by == signal.SIGKILL else ""
    if not explained:
        print(text, file=sys.stderr)
    if by == signal.SIGTERM:
        return exits.PREEMPTED
    return 128 + by if fatal is None else exits.STUCK


def _pass_on(reading: int, verbose: bool) -> tuple[str | None, bool]:
    """Passes errors on, but for JAX's report of a loss; returns that, and if the child said why."""
    fatal, explained = [], False
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            text = line.decode(errors="replace")
            ours = text.startswith(_OURS)
            explained = explained or text.startswith(_PREFIX)
            if FATAL in text or (fatal and not ours):
                fatal.append(text)
            if verbose or ours or not (fatal or _NOISE.match(text)):
                with contextlib.suppress(OSError):  # on a full disk, the run comes before its log
                    sys.stderr.write(text)
                    sys.stderr.flush()
    return ("".join(fatal) or None), explained
