"""What ends a run that is stuck: every phase has a deadline, and a thread that looks at the clock.

When a deadline passes, the stacks of all threads are printed, the stuck one first, and the process
ends with `exits.STUCK`; its parent and the other processes then end by themselves.

The thread needs Python's lock, which code in C may hold: so it keeps wound up an alarm of the C
library, a little later than the deadline, that prints the stacks and ends the process without it.

It also hears SIGTERM while the main thread is within C++, where Python's handlers must wait: after
`SIGTERM_SECONDS` in a phase that has nothing to save, it leaves with `exits.PREEMPTED`.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from saejax import exits

SIGTERM_SECONDS = 8.0
"""Of the 15 that a preempted machine may have."""

_POLL_SECONDS = 0.5
_ALARM_SECONDS = 3.0  # after the deadline, for the alarm that needs no lock
_OTHERS_SECONDS = 5.0  # those that wait for this one at the same deadline say it, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Deadlines in seconds; None is none.

    Attributes:
      start_seconds: from the start to the first of the other phases, and between and after them.
      harvest_seconds: between two signs of progress of a harvest.
      restore_seconds: reading a checkpoint.
      compile_seconds: compiling the step, and dispatching the first one.
      step_seconds: a step, reading its batch included.
      save_seconds: starting a save, which waits for the one before.
      evaluation_seconds: evaluation and report together.
    """

    start_seconds: float | None = 1800.0
    harvest_seconds: float | None = 3600.0
    restore_seconds: float | None = 3600.0
    compile_seconds: float | None = 3600.0
    step_seconds: float | None = 900.0
    save_seconds: float | None = 1800.0
    evaluation_seconds: float | None = 6 * 3600.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field.name} = {value} must be positive, or None (no deadline)")


PHASES = {
    field.name.removesuffix("_seconds"): field.name for field in dataclasses.fields(WatchdogConfig)
}
_WITHOUT_STATE = frozenset(PHASES) - {"step", "save"}  # nothing would be lost by leaving


@dataclasses.dataclass(frozen=True)
class _Phase:
    """What is being done, since when (monotonic), and by which thread."""

    name: str
    since: float
    thread: int


class _Dog:  # one to a process
    config = WatchdogConfig()
    phase: _Phase | None = None
    thread: threading.Thread | None = None
    alarm: "_Alarm | None" = None
    who, several = "this process", False
    ended = threading.Event()
    wake: tuple[int, int] | None = None


def start(config: WatchdogConfig = WatchdogConfig()) -> None:
    """Begins to watch, in phase "start"; for the main thread of a program, after any fork."""
    _Dog.config = config
    _Dog.ended.clear()
    enter("start", force=True)
    if _Dog.thread is not None:
        return
    _Dog.alarm = _Alarm()
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _Dog.wake = reading, writing
    _Dog.thread = threading.Thread(target=_run, args=(reading,), name="watchdog", daemon=True)
    _Dog.thread.start()


def configure(config: WatchdogConfig) -> None:
    """Sets the deadlines, from now on."""
    _Dog.config = config


def name_process(index: int, count: int) -> None:
    """Which process this is, of how many."""
    _Dog.who, _Dog.several = f"process {index} of {count}", count > 1


def stop() -> None:
    """Ends the watch."""
    if _Dog.thread is None:
        return
    _Dog.ended.set()
    _Dog.thread.join()
    _Dog.alarm.cancel()
    signal.set_wakeup_fd(-1)
    for end in _Dog.wake:
        os.close(end)
    _Dog.phase = _Dog.thread = _Dog.alarm = _Dog.wake = None


def enter(name: str, *, grace: float = 0.0, force: bool = False) -> None:
    """Begins a phase of `PHASES`, or anew the same one; without a watch, nothing happens.

    Args:
      name: of the phase.
      grace: seconds to add to its deadline.
      force: before there is a watch.
    """
    if force or _Dog.thread is not None:
        _Dog.phase = _Phase(name, time.monotonic() + grace, threading.get_ident())
        if _Dog.alarm is not None and (seconds := limit()) is not None:
            # At once: the thread may not come to it any more.
            _Dog.alarm.wind(seconds + grace, sooner=True)


def beat(*, grace: float = 0.0) -> None:
    """A sign of progress: the phase's deadline begins anew."""
    if (now := _Dog.phase) is not None:
        enter(now.name, grace=grace)


def beating(log: Callable[[str], None]) -> Callable[[str], None]:
    """A log each of whose lines is a sign of progress."""

    def tell(line: str) -> None:
        beat()
        log(line)

    return tell


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase, and after it the one before, whose deadline begins anew."""
    before = _Dog.phase
    enter(name)
    try:
        yield
    finally:
        if before is not None:
            enter(before.name)


def limit() -> float | None:
    """The deadline of the phase in seconds; None where there is none or nobody watches."""
    now = _Dog.phase
    return None if now is None else getattr(_Dog.config, PHASES[now.name])


def _run(reading: int) -> None:
    asked = None
    while not _Dog.ended.is_set():
        now, seconds, here = _Dog.phase, limit(), time.monotonic()
        if seconds is not None:
            left = now.since + seconds - here
            if left <= 0:
                _end(now, here - now.since)
            _Dog.alarm.wind(left)
        else:
            _Dog.alarm.cancel()
        if asked is not None and here - asked > SIGTERM_SECONDS and now.name in _WITHOUT_STATE:
            _tell("saejax: interrupted by SIGTERM; the same command continues\n")
            os._exit(exits.PREEMPTED)
        if select.select([reading], [], [], _POLL_SECONDS)[0]:
            with contextlib.suppress(BlockingIOError):
                heard = os.read(reading, 4096)
                if signal.SIGTERM in heard and asked is None:
                    asked = time.monotonic()


def _end(now: _Phase, seconds: float) -> None:
    """The last words: stacks of all threads, the stuck one first."""
    field = PHASES[now.name]
    text = (
        f"saejax: error: {_Dog.who} has been in the phase {now.name!r} for {seconds:.0f} s, and "
        f"Watchdog.{field} = {getattr(_Dog.config, field):g}: it is taken to be stuck, and ended. "
        f"The same command continues. Stacks of its threads, the stuck one first:\n"
    )
    frames, names = sys._current_frames(), {t.ident: t.name for t in threading.enumerate()}
    others = [ident for ident in frames if ident not in (now.thread, threading.get_ident())]
    for ident in (now.thread, *others):
        if ident in frames:
            stack = f"Thread {names.get(ident, ident)} (last call at the end):\n"
            stack += "".join(traceback.format_stack(frames[ident]))
            # Every line says whose it is: JAX may be printing at the same time, of lost processes.
            text += "".join(f"saejax: | {line}\n" for line in stack.splitlines())
    _tell(text)
    if _Dog.several:  # the end of this process is that of the others, before they have spoken
        _Dog.alarm.wind(_OTHERS_SECONDS)
        time.sleep(_OTHERS_SECONDS)
    os._exit(exits.STUCK)


def _tell(text: str) -> None:
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(2, data) :]


class _Alarm:
    """Stacks on stderr and the end of the process, by threads that need no lock of Python.

    The end is a POSIX timer whose thread calls `_exit`: Python's own, of `faulthandler`, could only
    end with 1. Where there are no such timers, it does.
    """

    def __init__(self):
        """Creates the timer."""
        self._timer, self._library = None, None
        self._lock, self._goes_off = threading.Lock(), math.inf
        with contextlib.suppress(OSError, AttributeError):
            self._library, self._timer = _exit_timer(exits.STUCK)

    def wind(self, seconds: float, *, sooner: bool = False) -> None:
        """It goes off a little later than so long, unless it is wound up again.

        Args:
          seconds: from now.
          sooner: only if it would go off later, or never.
        """
        with self._lock:
            if sooner and time.monotonic() + seconds > self._goes_off:
                return
            self._goes_off = time.monotonic() + seconds
            exits_itself = self._timer is not None
            after = seconds + _ALARM_SECONDS
            faulthandler.dump_traceback_later(after, exit=not exits_itself, file=2)
            if exits_itself:
                self._set(after + 1)

    def cancel(self) -> None:
        """It does not go off."""
        with self._lock:
            self._goes_off = math.inf
            faulthandler.cancel_dump_traceback_later()
            if self._timer is not None:
                self._set(0)

    def _set(self, seconds: float) -> None:
        whole = int(seconds)
        when = (ctypes.c_long * 4)(0, 0, whole, int((seconds - whole) * 1e9))
        self._library.timer_settime(self._timer, 0, when, None)


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux for SIGEV_THREAD."""

    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("pad", ctypes.c_char * 32),
    ]


def _exit_timer(code: int) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """A timer that calls `_exit(code)` in a thread of the C library.

    Raises:
      OSError, AttributeError: there is none here.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"struct sigevent of {sys.platform} is not known")
    library, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    library.timer_settime.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
    ]  # fmt: skip
    leave = ctypes.cast(library._exit, ctypes.c_void_p)
    event = _Event(value=code, notify=2, function=leave)  # SIGEV_THREAD
    if library.timer_create(1, ctypes.byref(event), ctypes.byref(timer)):  # CLOCK_MONOTONIC
        raise OSError(ctypes.get_errno(), "timer_create")
    return library, timer
