"""The launcher: its command line, what it tells the processes, and which failure it reports."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from launch import local


def test_what_follows_the_dashes_is_the_programs():
    options = local.parse(
        ["--processes", "4", "--devices_per_process=2", "--", "--gin_file=x", "a"]
    )
    assert (options.processes, options.devices_per_process) == (4, 2)
    assert options.arguments == ["--gin_file=x", "a"]
    assert local.parse(["--", "--x", "--", "y"]).arguments == ["--x", "--", "y"]
    assert local.parse([]).arguments == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=0"], "'0' must be a whole number, at least 1"),
        (["--processes=two"], "'two' must be a whole number, at least 1"),
        (["--port=0"], "'0' must be a whole number in [1, 65535]"),
        (["--port=65536"], "'65536' must be a whole number in [1, 65535]"),
        (["--gin_file=x"], "--gin_file=x is none of its flags; those of saejax.main go after --"),
        (["--processes=2", "--gin_file", "x"], "those of saejax.main go after --"),
    ],
)
def test_a_wrong_command_line_is_one_message(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        local.parse(flags)
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and message in errors and errors.count("\n") == 1


def test_a_process_is_told_its_place_and_devices(monkeypatch):
    monkeypatch.setenv("NPROC", "64")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    env = local.environment(2, 4, 8, 1234)
    assert env["SAEJAX_PROCESS_ID"] == "2" and env["SAEJAX_PROCESSES"] == "4"
    assert env["SAEJAX_COORDINATOR"] == "localhost:1234"
    assert int(env["SAEJAX_HEARTBEAT_SECONDS"]) < local._GRACE_SECONDS
    assert env["SAEJAX_LOCAL"] == "1"
    assert env["JAX_NUM_CPU_DEVICES"] == "8" and env["JAX_PLATFORMS"] == "cpu"
    assert env["NPROC"] == "64" and env["PATH"] == os.environ["PATH"]
    monkeypatch.delenv("NPROC")
    assert local.environment(0, 1, 8, 1)["NPROC"] == "16"


def run(tmp_path, work: str, processes: int = 3, before: str = "") -> subprocess.CompletedProcess:
    """The launcher with a program of ours in the place of saejax.main."""
    (tmp_path / "saejax").mkdir()
    (tmp_path / "saejax/__init__.py").touch()
    (tmp_path / "saejax/main.py").write_text(
        "import os, signal, sys, time\ni = int(os.environ['SAEJAX_PROCESS_ID'])\n"
        f"say = lambda text: print(text, file=sys.stderr, flush=True)\n{work}\n"
    )
    code = f"import sys; sys.path.insert(0, {os.getcwd()!r})\n" + (
        f"from launch import local\nlocal._GRACE_SECONDS = 1\n{before}\n"
        f"sys.exit(local.main(['--processes={processes}']))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_output_of_process_0_is_passed_on(tmp_path):
    done = run(tmp_path, "print(f'out {i}')\nsay(f'err {i}')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out 0\n", "err 0\n")


def test_all_stopped_is_stopped(tmp_path):
    assert run(tmp_path, "sys.exit(42)").returncode == 42


def test_the_first_failure_is_reported_and_ends_the_rest(tmp_path):
    done = run(tmp_path, "if i == 1: say('disk full'); sys.exit(7)\ntime.sleep(600)")
    assert (done.returncode, done.stderr) == (7, "[process 1] disk full\n")


def test_those_that_lost_another_one_are_not_the_cause(tmp_path):
    work = (
        "if i == 2: time.sleep(0.5); os.kill(os.getpid(), 9)\n"
        "say(f'saejax: error: process {i} lost another process'); sys.exit(1)"
    )
    done = run(tmp_path, work)
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.splitlines() == [
        "saejax: error: process 0 lost another process",
        "[process 2] ended by SIGKILL",
    ]


def test_those_that_lost_the_preempted_one_are_preempted_with_it(tmp_path):
    work = "if i == 2: sys.exit(42)\nsay(f'process {i} lost another process'); sys.exit(124)"
    assert run(tmp_path, work).returncode == 42
    shutil.rmtree(tmp_path / "saejax")
    assert run(tmp_path, work.replace("sys.exit(42)", "sys.exit(1)")).returncode == 1
    shutil.rmtree(tmp_path / "saejax")
    assert run(tmp_path, work.replace("sys.exit(42)", "sys.exit(124)")).returncode == 124


def test_one_message_of_all_is_told_once(tmp_path):
    done = run(tmp_path, "say('k = 0 is wrong'); sys.exit(1)")
    assert (done.returncode, done.stderr) == (1, "k = 0 is wrong\n")


def test_signals_reach_all(tmp_path):
    work = (
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(42))\n"
        "if i == 0: time.sleep(1); os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)"
    )
    assert run(tmp_path, work).returncode == 42


def test_the_output_of_process_0_is_told_once(tmp_path):
    done = run(tmp_path, "if i == 0: say('oh'); os.kill(os.getpid(), 9)\ntime.sleep(600)")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.splitlines() == ["oh", "[process 0] ended by SIGKILL"]


# What comes before the start of process 2: the others are there and must not stay.
AT_THE_THIRD = """
import os, signal, subprocess
start = subprocess.Popen
def third(*args, **more):
    if more["env"]["SAEJAX_PROCESS_ID"] == "2":
        {}
    process = start(*args, **more)
    print(process.pid, flush=True)
    return process
local.subprocess.Popen = third
"""


def ended(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False


def test_one_that_cannot_be_started_ends_those_before_it(tmp_path):
    before = AT_THE_THIRD.format("raise BlockingIOError(11, 'Resource temporarily unavailable')")
    done = run(tmp_path, "time.sleep(600)", before=before)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("launch.local: error: process 2 could not be started (")
    assert "Resource temporarily unavailable" in done.stderr
    assert len(done.stdout.split()) == 2 and all(map(ended, done.stdout.split()))


def test_a_signal_during_the_start_reaches_all(tmp_path):
    before = AT_THE_THIRD.format("os.kill(os.getpid(), signal.SIGTERM)")
    done = run(tmp_path, "time.sleep(600)", processes=4, before=before)
    assert done.returncode == 42, done.stderr
    assert len(done.stdout.split()) == 3 and all(map(ended, done.stdout.split()))


def test_a_signal_before_the_start_starts_nothing(capsys):
    group = local.Group()
    group.send(signal.SIGTERM)
    group.start(local.parse([]))
    assert group.wait() == 42
    group.send(signal.SIGHUP)
    assert group.wait() == 129
