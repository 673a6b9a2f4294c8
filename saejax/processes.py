"""Several processes as one run: how they start, agree, and end together.

Each process is told who it is by its environment, and does the same work with its own devices:

    SAEJAX_COORDINATOR=host0:1234 SAEJAX_PROCESSES=4 SAEJAX_PROCESS_ID=2 python -m saejax.main ...

SLURM, Open MPI and GKE TPU slices need none of these; on a Cloud TPU VM, SAEJAX_PROCESSES=auto asks
its metadata. SAEJAX_PROCESSES=1 runs alone, whatever is detected. One that says nothing for
SAEJAX_HEARTBEAT_SECONDS is taken for dead. `python -m launch.local` starts several on one machine.

JAX aborts a process that has lost another one from C++, with a stack trace and without a word to
Python. So each process of several is a pair: a child that works, and its parent, which passes
its output on, puts one line in the place of that trace, and returns its exit code. The only file
that calls `jax.distributed`.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# JAX is imported inside functions: a process is forked here, which threads would not survive.

_LOG = logging.getLogger(__name__)
_FOREVER_MS = 7 * 24 * 3600 * 1000
_FATAL = "Terminating process because the JAX distributed service detected fatal errors"
_NOISE = re.compile(r"[IWE]\d{4} .*(coordination|distributed|gloo)", re.I)  # what leads up to it
# What JAX says when another process is gone: in its JaxRuntimeError; and in the ValueError that a
# failure of Gloo is, raised by C++ without a frame of JAX, but led by the name of a status.
_LOST = re.compile(
    r"(?i)(gloo|nccl) [\w -]+ (failed|error)|connection (closed by|reset)|socket closed|heartbeat|"
    r"tasks have crashed|barrier (failed|timed out)|coordination ?service"
)
_GLOO = re.compile(r"[A-Z_]+: (.*: )?Gloo [\w -]+ failed: ")
_PREFIX = "saejax: error: "
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_UNDETECTED = (
    "SAEJAX_PROCESSES = 'auto', but JAX detects no cluster here; set it to the number of processes "
    "and set SAEJAX_COORDINATOR and SAEJAX_PROCESS_ID, or set it to 1 to run alone"
)
_GONE = (
    "lost another process, which ended or cannot be reached; its own last message says why. Start "
    "all of them again: the same command continues from the last checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How this process joins the others; fields that JAX detects by itself are None.

    Attributes:
      coordinator: host and port of process 0, where all meet.
      count, index: number of processes; which one this is.
      wait_seconds: how long to wait for the others to start.
      heartbeat_seconds: one that was silent for so long is taken for dead.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    wait_seconds: int = 300
    heartbeat_seconds: int = 60

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
    beat = _whole(env, "SAEJAX_HEARTBEAT_SECONDS", 1, 10**6, default="60")
    by_jax = Settings(wait_seconds=wait, heartbeat_seconds=beat)
    if env.get("SAEJAX_PROCESSES", "").strip() == "auto":
        return by_jax
    if "SAEJAX_PROCESSES" not in env:
        for name in sorted({"SAEJAX_COORDINATOR", "SAEJAX_PROCESS_ID"} & set(env)):
            says = f"{name} = {env[name]!r} is set, but SAEJAX_PROCESSES is not"
            raise ValueError(f"{says}; set it to the number of processes, or unset {name}")
        return by_jax if _detected(env) else None
    count = _whole(env, "SAEJAX_PROCESSES", 1, 10**6)
    if count == 1:
        return None
    coordinator = env.get("SAEJAX_COORDINATOR", "")
    place = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
    if place is None or not 1 <= int(place[1]) <= 65535:
        raise ValueError(
            f"SAEJAX_COORDINATOR = {coordinator!r} must be host:port of process 0, port at most "
            f"65535, the same in all {count} processes; localhost:8476 if all run on one machine"
        )
    index = _whole(env, "SAEJAX_PROCESS_ID", 0, count - 1)
    return Settings(coordinator, count, index, wait, beat)


def _whole(env: Mapping[str, str], name: str, least: int, most: int, default: str = "") -> int:
    text = env.get(name, default).strip()
    if not text.isdigit() or not least <= int(text) <= most:
        has = f"{name} = {env[name]!r}" if name in env else f"{name} is not set; it"
        auto = ", or 'auto'" if name == "SAEJAX_PROCESSES" else ""
        raise ValueError(f"{has} must be a whole number in [{least}, {most}]{auto}")
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


class _Together:  # the state of this process among the others
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
    _resolve(found)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    try:
        limits = {
            "initialization_timeout": found.wait_seconds,
            "heartbeat_timeout_seconds": found.heartbeat_seconds,
            "shutdown_timeout_seconds": 30,
        }
        jax.distributed.initialize(found.coordinator, found.count, found.index, **limits)
    except (RuntimeError, ValueError) as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise ConnectionError(_missing(found)) from error
        if found.count is None and "be defined" in str(error):
            raise ValueError(_UNDETECTED) from error
        raise ConnectionError(f"{found} could not join the others: {error}") from error
    try:
        jax.local_devices()
    except RuntimeError as error:
        fix = "start at most as many processes as there are devices, or set JAX_PLATFORMS=cpu"
        raise ValueError(f"{found} has no device; {fix} ({error})") from error
    if jax.process_index() > 0:
        logging.getLogger("saejax").setLevel(logging.ERROR)  # one process tells of progress


def _resolve(found: Settings) -> None:
    """Waits until the coordinator's host has an address, which a cluster may give it late."""
    deadline, text = time.monotonic() + found.wait_seconds, ""
    while found.coordinator:
        try:
            socket.getaddrinfo(found.coordinator.rpartition(":")[0].strip("[]"), None)
            return
        except OSError as error:
            if not text:
                text = f"the host of SAEJAX_COORDINATOR = {found.coordinator!r} cannot be resolved"
                _LOG.warning("%s; trying again for %d s", text, found.wait_seconds)
            if time.monotonic() > deadline:
                raise ConnectionError(f"{text} ({error}); correct it in all processes") from error
        time.sleep(0.5)


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
    """The end of a run that went well: waits for the others, whom it then does not surprise."""
    meet("end")
    _Together.ending = True


def _key(name: str) -> str:
    _Together.steps += 1
    return f"saejax/{_Together.steps}/{name}"


def _client() -> Any:
    # No public function waits without using the devices, whose collectives may time out.
    try:
        return importlib.import_module("jax._src.distributed").global_state.client
    except (ImportError, AttributeError) as error:
        lack = "this jax has no jax._src.distributed.global_state.client, by which processes wait"
        raise RuntimeError(f"{lack}; install a version in the range of setup.py") from error


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Turns what JAX says when another process is gone into a ConnectionError of one line."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        of_jax = isinstance(error, jax.errors.JaxRuntimeError)
        if count() == 1 or not (_LOST.search if of_jax else _GLOO.match)(str(error)):
            raise
        first = str(error).strip().splitlines()[0]
        raise ConnectionError(f"process {index()} of {count()} {_GONE} ({first})") from error


def _missing(found: Settings) -> str:
    others = "the others" if found.count is None else f"all {found.count}"
    return (
        f"{found} waited {found.wait_seconds} s for {others} to start; start the missing ones with "
        f"the same SAEJAX_COORDINATOR and SAEJAX_PROCESSES, or wait longer with SAEJAX_WAIT_SECONDS"
    )


def watched(work: Callable[[], int], *, verbose: bool = False) -> int:
    """Runs `work`, the whole of a program; among several processes, in a child that is watched.

    Call it before JAX is imported: it forks.

    Args:
      work: returns the exit code; calls `join` before it uses a device.
      verbose: pass on everything that JAX prints about lost processes.

    Returns:
      The exit code of `work`; 1 if JAX aborted it, 128 + n if signal n ended it (143: SIGTERM
      before or after training). Alone, SIGTERM acts there as Ctrl-C does: KeyboardInterrupt.
    """
    found = None
    with contextlib.suppress(ValueError):  # `join` raises it, where errors are expected
        found = settings(os.environ)
    if found is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
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
        text = _PREFIX + (_missing(found) if "RegisterTask" in fatal else f"{found} {_GONE}")
    elif by in _FORWARDED:  # the same line in all that were interrupted
        text = f"saejax: interrupted by {by.name}; the same command continues"
    else:
        text = f"{_PREFIX}{found} was ended by {by.name}"
        text += " (out of memory?)" if by == signal.SIGKILL else ""
    if not explained:
        print(text, file=sys.stderr)
    return 1 if by == signal.SIGABRT else 128 + by


def _pass_on(reading: int, verbose: bool) -> tuple[str | None, bool]:
    """Passes errors on, but for JAX's report of a loss; returns that, and if the child said why."""
    fatal, explained = [], False
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
