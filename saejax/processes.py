"""Several processes as one run: how they start, agree, and end together.

Each process is told who it is by its environment, and does the same work with its own devices:

    SAEJAX_COORDINATOR=host0:1234 SAEJAX_PROCESSES=4 SAEJAX_PROCESS_ID=2 python -m saejax.main ...

SLURM, Open MPI and GKE TPU slices need none of these; on a Cloud TPU VM, SAEJAX_PROCESSES=auto asks
its metadata. SAEJAX_PROCESSES=1 runs alone, whatever is detected. `python -m launch.local` starts
several on one machine.

JAX aborts a process that has lost another one from C++, with a stack trace and without a word to
Python. So each process of several is a pair: a child that works, and its parent, which passes
its output on, puts one line in the place of that trace, and returns its exit code.

The only file that calls `jax.distributed`.
"""

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# JAX is imported inside functions: a process is forked here, which threads would not survive.

_HEARTBEAT_SECONDS = 15  # a process that was silent for so long is taken for dead
_SHUTDOWN_SECONDS = 30
_FOREVER_MS = 7 * 24 * 3600 * 1000
_FATAL = "Terminating process because the JAX distributed service detected fatal errors"
_NOISE = re.compile(r"[IWE]\d{4} .*(coordination|distributed|gloo)", re.I)  # what leads up to it
_LOST = re.compile(r"gloo|nccl|coordination|heartbeat|connection (closed|reset)|socket", re.I)
_PREFIX = "saejax: error: "


@dataclasses.dataclass(frozen=True)
class Settings:
    """How this process joins the others; fields that JAX detects by itself are None.

    Attributes:
      coordinator: host and port of process 0, where all meet.
      count: number of processes.
      index: of this one.
      wait_seconds: how long to wait for the others to start.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    wait_seconds: int = 300

    def __str__(self) -> str:
        if self.count is None:
            return "this process"
        return f"process {self.index} of {self.count} (coordinator {self.coordinator})"


class LeaderError(RuntimeError):
    """Process 0 failed at what it does for all; it has said why."""


def settings(env: Mapping[str, str]) -> Settings | None:
    """What the environment says about other processes; None for a run of one.

    Raises:
      ValueError: a variable is missing or holds no value that fits.
    """
    wait = _whole(env, "SAEJAX_WAIT_SECONDS", 1, 10**6, default="300")
    if env.get("SAEJAX_PROCESSES", "").strip() == "auto":
        return Settings(wait_seconds=wait)
    if "SAEJAX_PROCESSES" not in env:
        for name in ("SAEJAX_COORDINATOR", "SAEJAX_PROCESS_ID"):
            if name in env:
                raise ValueError(
                    f"{name} = {env[name]!r} is set, but SAEJAX_PROCESSES is not; set it to the "
                    f"number of processes, or unset {name}"
                )
        return Settings(wait_seconds=wait) if _detected(env) else None
    count = _whole(env, "SAEJAX_PROCESSES", 1, 10**6)
    if count == 1:
        return None
    coordinator = env.get("SAEJAX_COORDINATOR", "")
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise ValueError(
            f"SAEJAX_COORDINATOR = {coordinator!r} must be host:port of process 0, the same in all "
            f"{count} processes; 'localhost:8476', for one, if all run on this machine"
        )
    index = _whole(env, "SAEJAX_PROCESS_ID", 0, count - 1)
    return Settings(coordinator, count, index, wait)


def _whole(env: Mapping[str, str], name: str, least: int, most: int, default: str = "") -> int:
    text = env.get(name, default).strip()
    if not text.isdigit() or not least <= int(text) <= most:
        raise ValueError(
            f"{name} = {env.get(name)!r} must be a whole number in [{least}, {most}]"
            + (", or 'auto'" if name == "SAEJAX_PROCESSES" else "")
        )
    return int(text)


def _detected(env: Mapping[str, str]) -> bool:
    """Whether the environment is a cluster job of several processes that JAX can join by itself."""

    def number(name: str) -> int:
        return int(env[name]) if env.get(name, "").isdigit() else 1

    slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= set(env)
    return (
        # The step's tasks: an interactive shell of a larger job is one task and runs alone.
        (slurm and number("SLURM_STEP_NUM_TASKS") > 1 and number("SLURM_NTASKS") > 1)
        or ("OMPI_MCA_orte_hnp_uri" in env and number("OMPI_COMM_WORLD_SIZE") > 1)
        or ("TPU_WORKER_ID" in env and "," in env.get("TPU_WORKER_HOSTNAMES", ""))
        or number("MEGASCALE_NUM_SLICES") > 1
    )


# --- Together -------------------------------------------------------------------------------------


class _Together:
    """The state of this process among the others."""

    steps = 0  # calls of `lead` and `meet` so far, the same in every process
    ending = False  # every process is known to end


def join() -> None:
    """Joins the other processes of this run, if there are any; call before any use of a device.

    Raises:
      ValueError: the environment names no valid place among them; or this process has no device.
      ConnectionError: they did not all start in time.
    """
    found = settings(os.environ)
    import jax

    if found is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.index,
            initialization_timeout=found.wait_seconds,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise ConnectionError(_missing(found)) from error
        raise ConnectionError(f"{found} could not join the others: {error}") from error
    try:
        jax.local_devices()
    except RuntimeError as error:
        raise ValueError(
            f"{found} has no device; start at most as many processes as there are devices, or set "
            f"JAX_PLATFORMS=cpu ({error})"
        ) from error
    if jax.process_index() > 0:
        logging.getLogger("saejax").setLevel(logging.ERROR)  # one process tells of progress


def count() -> int:
    """Number of processes."""
    import jax

    return jax.process_count()


def index() -> int:
    """This process; 0 leads: it writes what there is one of, and prints progress."""
    import jax

    return jax.process_index()


def lead(name: str, action: Callable[[], Any]) -> Any:
    """Lets process 0 act for all while the others wait, however long it takes.

    Args:
      name: of the action; every process makes the same calls in the same order.
      action: its result must be representable in JSON.

    Returns:
      The result, in every process.

    Raises:
      LeaderError: in the others, when the action failed in process 0, which raises its own error.
    """
    if count() == 1:
        return action()
    key = _key(name)
    if index() > 0:
        outcome = json.loads(_client().blocking_key_value_get(key, _FOREVER_MS))
        if "error" in outcome:
            _Together.ending = True
            raise LeaderError(f"process 0 failed: {outcome['error']}")
        return outcome["result"]
    try:
        result = action()
    except BaseException as error:
        _Together.ending = True
        _client().key_value_set(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    _client().key_value_set(key, json.dumps({"result": result}))
    return result


def meet(name: str) -> None:
    """Waits until every process is here, however long it takes."""
    if count() > 1:
        _client().wait_at_barrier(_key(name), _FOREVER_MS)


def part() -> None:
    """The end of a run that went well: waits for the others, whose end then surprises nobody."""
    meet("end")
    _Together.ending = True


def _key(name: str) -> str:
    _Together.steps += 1
    return f"saejax/{_Together.steps}/{name}"


def _client() -> Any:
    # No public function waits without using the devices, whose collectives may time out.
    from jax._src import distributed

    return distributed.global_state.client


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Turns what a backend says when another process is gone into a ConnectionError of one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, LeaderError) or count() == 1 or not _LOST.search(str(error)):
            raise
        raise ConnectionError(_lost(f"process {index()} of {count()}")) from error


def _missing(found: Settings) -> str:
    others = "the others" if found.count is None else f"all {found.count}"
    return (
        f"{found} waited {found.wait_seconds} s for {others} to start; start the missing ones with "
        f"the same SAEJAX_COORDINATOR and SAEJAX_PROCESSES, or wait longer with SAEJAX_WAIT_SECONDS"
    )


def _lost(who: str) -> str:
    return (
        f"{who} lost another process, which ended or cannot be reached; its own last message says "
        f"why. Start all of them again: the same command continues from the last checkpoint"
    )


# --- The pair of processes ------------------------------------------------------------------------


def watched(work: Callable[[], int], *, verbose: bool = False) -> int:
    """Runs `work`, the whole of a program; among several processes, in a child that is watched.

    Call it before JAX is imported: it forks.

    Args:
      work: returns the exit code; calls `join` before it uses a device.
      verbose: pass on everything that JAX prints about lost processes.

    Returns:
      The exit code of `work`; 1 if JAX aborted it, 128 + n if signal n ended it.
    """
    try:
        found = settings(os.environ)
    except ValueError:
        found = None  # `join` raises it, where errors are expected
    if found is None:
        return work()
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return _watch(child, reading, found, verbose)
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent alone, which forwards it once
    _die_with_parent()
    if not verbose:  # Gloo prints its connections to stdout
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return _work(work)


def _work(work: Callable[[], int]) -> int:
    """Runs `work` and leaves the others such that they neither hang nor are surprised."""
    try:
        code = work()
    except LeaderError:
        code = 1
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return code
    if _Together.ending:
        with contextlib.suppress(RuntimeError):  # one that is gone already is no matter now
            jax.distributed.shutdown()
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    if index() == 0:
        time.sleep(1)  # the others abort when the coordinator is gone: let them say their own error
    os._exit(code or 1)  # a regular exit waits for all of them


def _watch(child: int, reading: int, found: Settings, verbose: bool) -> int:
    forwarded = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {name: signal.getsignal(name) for name in forwarded}

    def forward(number, frame):
        del frame
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for name in forwarded:
        signal.signal(name, forward)
    try:
        fatal, explained = _pass_on(reading, verbose)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    if status >= 0:
        return status
    if fatal is not None and not explained:
        text = _missing(found) if "RegisterTask" in fatal else _lost(str(found))
        print(_PREFIX + text, file=sys.stderr)
    elif status not in (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP) and not explained:
        name = signal.Signals(-status).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"{_PREFIX}{found} was ended by {name}{hint}", file=sys.stderr)
    return 1 if status == -signal.SIGABRT else 128 - status


def _pass_on(reading: int, verbose: bool) -> tuple[str | None, bool]:
    """Copies the child's errors to ours, but for JAX's report of a lost process.

    Returns:
      That report, if there was one; and whether the child has explained its own end.
    """
    fatal: list[str] = []
    explained = False
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            text = line.decode(errors="replace")
            ours = text.startswith(_PREFIX)
            explained = explained or ours
            if _FATAL in text or (fatal and not ours):
                fatal.append(text)
            if verbose or ours or not (fatal or _NOISE.match(text)):
                sys.stderr.write(text)
                sys.stderr.flush()
    return ("".join(fatal) or None), explained


def _die_with_parent() -> None:
    """A parent that was killed takes its child along (Linux; elsewhere the child goes on alone)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
