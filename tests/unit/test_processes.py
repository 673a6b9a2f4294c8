"""How a process learns of the others, and what its parent makes of its end."""

import os
import signal
import subprocess
import sys

import pytest

from saejax import processes
from saejax.processes import Settings, settings

FOUR = {
    "SAEJAX_PROCESSES": "4",
    "SAEJAX_PROCESS_ID": "3",
    "SAEJAX_COORDINATOR": "host0:1234",
}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}


def test_the_environment_names_the_place_of_a_process():
    assert settings(FOUR) == Settings("host0:1234", 4, 3, 300)
    assert settings(FOUR | {"SAEJAX_WAIT_SECONDS": "9"}).wait_seconds == 9
    assert str(settings(FOUR)) == "process 3 of 4 (coordinator host0:1234)"


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SAEJAX_PROCESSES": "1"},
        {"SAEJAX_PROCESSES": "1", **SLURM},
        {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell in a job of four tasks
        {k: v for k, v in SLURM.items() if k != "SLURM_PROCID"},
    ],
)
def test_one_process_is_alone(env):
    assert settings(env) is None


@pytest.mark.parametrize("env", [SLURM, GKE, {"MEGASCALE_NUM_SLICES": "2"}])
def test_a_cluster_is_left_to_jax(env):
    assert settings(env) == Settings(wait_seconds=300)
    assert settings({"SAEJAX_PROCESSES": "auto"}) == Settings(wait_seconds=300)
    assert settings(env | FOUR) == settings(FOUR), "what is said wins over what is found"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SAEJAX_PROCESSES": "four"}, r"SAEJAX_PROCESSES = 'four' .* whole number .* or 'auto'"),
        ({"SAEJAX_PROCESSES": "0"}, r"SAEJAX_PROCESSES = '0' must be a whole number in \[1, "),
        ({"SAEJAX_PROCESS_ID": "4"}, r"SAEJAX_PROCESS_ID = '4' .* in \[0, 3\]"),
        ({"SAEJAX_PROCESS_ID": None}, r"SAEJAX_PROCESS_ID = None .* in \[0, 3\]"),
        ({"SAEJAX_COORDINATOR": None}, r"SAEJAX_COORDINATOR = '' must be host:port of process 0"),
        ({"SAEJAX_COORDINATOR": "host0"}, "SAEJAX_COORDINATOR = 'host0' must be host:port"),
        ({"SAEJAX_PROCESSES": None}, "SAEJAX_COORDINATOR = .* is set, but SAEJAX_PROCESSES is not"),
        ({"SAEJAX_WAIT_SECONDS": "soon"}, "SAEJAX_WAIT_SECONDS = 'soon' must be a whole number"),
    ],
)
def test_a_place_that_is_none_is_refused(change, message):
    env = {k: v for k, v in (FOUR | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        settings(env)


def test_one_process_acts_for_itself():
    assert processes.lead("x", lambda: {"a": 1}) == {"a": 1}
    processes.meet("x")
    with pytest.raises(OSError, match="full"):
        processes.lead("x", lambda: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ValueError, match="Gloo"), processes.losses_named():
        raise ValueError("Gloo: nothing is lost by one alone")


# --- A parent and its child -----------------------------------------------------------------------

FATAL = "F1121 12:00:00.0 1 client.h:80] " + processes._FATAL


def watched(body: str, *, verbose: bool = False) -> subprocess.CompletedProcess:
    """Runs Python code as process 3 of 4 that never joins."""
    code = (
        "import os, signal, sys, time\nfrom saejax import processes\ndef work():\n"
        + "".join(f"    {line}\n" for line in body.split("\n"))
        + f"sys.exit(processes.watched(work, verbose={verbose}))"
    )
    env = {**os.environ, **FOUR, "PYTHONPATH": os.getcwd()}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_output_and_exit_code_are_passed_on():
    done = watched("print('out')\nprint('err', file=sys.stderr)\nreturn 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, "out\n", "err\n")
    assert watched("return 0").returncode == 0
    assert watched("raise SystemExit(3)").returncode == 3


def test_an_unexpected_error_keeps_its_traceback():
    done = watched("raise RuntimeError('oh')")
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: oh\n")


@pytest.mark.parametrize(
    ("call", "says"),
    [("RegisterTask", "waited 300 s for all 4 to start"), ("PollForError", "lost another process")],
)
def test_an_abort_becomes_one_line(call, says):
    body = f"os.write(2, b'''{FATAL}: {call}\\n  @ 0x1 stack\\n''')\nos.abort()"
    done = watched(body)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and says in done.stderr
    assert done.stderr.startswith("saejax: error: process 3 of 4 (coordinator host0:1234)")
    assert "stack" in watched(body, verbose=True).stderr


def test_a_process_that_explained_itself_is_not_explained_again():
    line = "saejax: error: gone"
    for lines in ((line, FATAL), (FATAL, line)):
        text = "\\n".join(lines)
        done = watched(f"os.write(2, b'''{text}\\n''')\nos.abort()")
        assert (done.returncode, done.stderr) == (1, line + "\n")


def test_a_signal_that_ended_it_is_named():
    done = watched("os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr == (
        "saejax: error: process 3 of 4 (coordinator host0:1234) was ended by SIGKILL "
        "(out of memory?)\n"
    )


def test_signals_are_forwarded_once():
    body = (
        "seen = []\nsignal.signal(signal.SIGTERM, lambda *a: seen.append(1))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(0.5)\nprint(len(seen))\nreturn 42"
    )
    done = watched(body)
    assert (done.returncode, done.stdout) == (42, "1\n"), done.stderr


def test_a_place_that_is_none_is_left_to_join():
    done = subprocess.run(
        [sys.executable, "-m", "saejax.main", "--gin_file=gin/synthetic.gin", "--workdir=/proc/x"],
        env={**os.environ, **FOUR, "SAEJAX_PROCESS_ID": "9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("saejax: error: SAEJAX_PROCESS_ID = '9' must be")
    assert done.stderr.count("\n") == 1
