"""A stuck process ends by itself, in time, with the stack that is stuck."""

import os
import re
import subprocess
import sys
import time
from concurrent import futures

import pytest

from saejax import watchdog
from saejax.watchdog import WatchdogConfig

BEGIN = """
import ctypes, os, signal, sys, threading, time
from saejax import ending, processes, watchdog
watchdog._ALARM_SECONDS = 1.0
watchdog.SIGTERM_SECONDS = watchdog._OTHERS_SECONDS = 1.0
def stuck_here():
    {how}
def work():
    watchdog.start(watchdog.WatchdogConfig(start_seconds=None, step_seconds=1, save_seconds=9))
    watchdog.name_process(1, 2)
    {before}
    stuck_here()
    watchdog.stop()
    time.sleep(2.5)
    return 7
sys.exit(processes.watched(lambda: ending.code_of(work)))
"""
ALONE = {k: v for k, v in os.environ.items() if not k.startswith("SAEJAX")}
IN_A_PAIR = {"SAEJAX_PROCESSES": "2", "SAEJAX_PROCESS_ID": "1", "SAEJAX_COORDINATOR": "x:1"}


def run(how: str, before: str = "watchdog.enter('step')", **env: str):
    """Runs a process that gets stuck; its result, and the seconds that it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", BEGIN.format(how=how, before=before)],
        env={**ALONE, "PYTHONPATH": os.getcwd(), **env},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done, time.monotonic() - began


@pytest.mark.parametrize("env", [{}, IN_A_PAIR])
@pytest.mark.parametrize(
    "how",
    [
        "time.sleep(50)",
        "ctypes.CDLL(None).sleep(50)",
        "threading.Event().wait()",
        "\n    while 1: 0",
    ],
)
def test_a_stuck_phase_ends_with_its_stack(how, env):
    done, seconds = run(how, **env)
    assert done.returncode == 124 and seconds < 15, done.stderr
    lines = done.stderr.splitlines()
    assert re.match(
        r"saejax: error: process 1 of 2 has been in the phase 'step' for \d s, and "
        r"Watchdog\.step_seconds = 1: it is taken to be stuck, and ended\. The same command "
        r"continues\.",
        lines[0],
    )
    assert lines[1] == "saejax: | Thread MainThread (last call at the end):", "the stuck one first"
    assert "in stuck_here" in done.stderr


@pytest.mark.parametrize("env", [{}, IN_A_PAIR])
def test_c_code_that_holds_pythons_lock_is_ended_too(env):
    done, seconds = run("ctypes.PyDLL(None).sleep(50)", **env)
    assert done.returncode == 124 and seconds < 15, done.stderr
    assert "in stuck_here" in done.stderr and "Timeout" in done.stderr


def test_the_deadline_is_that_of_the_phase_and_begins_anew_with_it():
    every = "\n    for _ in range(5): time.sleep(0.5); watchdog.{}"
    inside = "\n    with watchdog.phase('save'): time.sleep(2.5)"
    cases = [
        (every.format("beat()"),),
        (every.format("enter('step')"),),
        ("time.sleep(2.5)", "watchdog.enter('save')"),
        ("time.sleep(2.5)", ""),  # no deadline at all
        (inside,),
        (inside + "\n    time.sleep(9)",),
    ]
    with futures.ThreadPoolExecutor() as pool:  # they sleep, most of the time
        codes = [done.returncode for done, _ in pool.map(lambda case: run(*case), cases)]
    assert codes == [7, 7, 7, 7, 7, 124]


TERM = "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start(); "
IN_C = "ctypes.CDLL(None).system(b'exec sleep 5')"  # goes on after a signal


def test_sigterm_is_heard_while_c_does_not_return():
    done, seconds = run(TERM + IN_C, "watchdog.enter('evaluation')")
    assert done.returncode == 42 and seconds < 15, done.stderr
    assert done.stderr == "saejax: interrupted by SIGTERM; the same command continues\n"


def test_a_save_is_waited_for():
    handled = "signal.signal(signal.SIGTERM, lambda *_: None); "
    done, _ = run(handled + TERM + IN_C, "watchdog.enter('save')")
    assert done.returncode == 7, done.stderr


def test_without_a_watch_nothing_is_watched():
    assert watchdog.limit() is None
    watchdog.enter("step")
    watchdog.beat()
    with watchdog.phase("save"):
        pass
    watchdog.stop()
    assert watchdog.limit() is None


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_deadlines_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match=r"step_seconds = .* must be positive, or None"):
        WatchdogConfig(step_seconds=value)
    assert WatchdogConfig(step_seconds=None).step_seconds is None
