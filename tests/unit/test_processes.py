"""How a process learns of the others, and what its parent makes of its end."""

import importlib
import os
import signal
import subprocess
import sys

import jax
import pytest

from saejax import processes
from saejax.processes import Settings, group, losses, preflight, settings, watching
from saejax.rundir import RunDirectory

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
    assert settings(FOUR) == Settings(coordinator="host0:1234", count=4, index=3)
    assert settings(FOUR).wait_seconds == 900 and not settings(FOUR).local
    assert settings(FOUR | {"SAEJAX_LOCAL": "1"}).local
    assert settings(FOUR | {"SAEJAX_WAIT_SECONDS": "9"}).wait_seconds == 9
    assert settings(FOUR).heartbeat_seconds == 60
    for env in (FOUR, SLURM):
        assert settings(env | {"SAEJAX_HEARTBEAT_SECONDS": "7"}).heartbeat_seconds == 7
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


SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "slice0:8080",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MEGASCALE_SLICE_ID": ""}, r"MEGASCALE_NUM_SLICES = '2', but MEGASCALE_SLICE_ID not set"),
        ({"MEGASCALE_NUM_SLICES": ""}, "but MEGASCALE_NUM_SLICES not set: left from an earlier"),
        ({"MEGASCALE_SLICE_ID": "2"}, r"MEGASCALE_SLICE_ID = '2' must be a whole number in .0, 1"),
        ({"MEGASCALE_NUM_SLICES": "two"}, "MEGASCALE_NUM_SLICES = 'two' must be a whole number"),
    ],
)
def test_slices_that_contradict_each_other_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        settings(SLICES | change)


def test_a_process_of_several_that_is_told_to_be_alone_says_so():
    with pytest.raises(ValueError, match=r"SAEJAX_PROCESS_ID = '1' must be .* in .0, 0"):
        settings({"SAEJAX_PROCESSES": "1", "SAEJAX_PROCESS_ID": "1"})


@pytest.mark.parametrize("env", [SLURM, GKE, SLICES])
def test_a_cluster_is_left_to_jax(env):
    assert settings(env) == Settings()
    assert settings({"SAEJAX_PROCESSES": "auto"}) == Settings()
    assert settings(env | FOUR) == settings(FOUR), "what is said wins over what is found"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SAEJAX_PROCESSES": "four"}, r"SAEJAX_PROCESSES = 'four' .* whole number .* or 'auto'"),
        ({"SAEJAX_PROCESSES": "0"}, r"SAEJAX_PROCESSES = '0' must be a whole number in \[1, "),
        ({"SAEJAX_PROCESS_ID": "4"}, r"SAEJAX_PROCESS_ID = '4' .* in \[0, 3\]"),
        ({"SAEJAX_PROCESS_ID": None}, r"SAEJAX_PROCESS_ID is not set; it must be .* in \[0, 3\]"),
        ({"SAEJAX_COORDINATOR": None}, r"SAEJAX_COORDINATOR = '' must be host:port of process 0"),
        ({"SAEJAX_COORDINATOR": "host0"}, "SAEJAX_COORDINATOR = 'host0' must be host:port"),
        ({"SAEJAX_COORDINATOR": "host0:0"}, "SAEJAX_COORDINATOR = 'host0:0' .* port at most 65535"),
        ({"SAEJAX_COORDINATOR": "host0:65536"}, "'host0:65536' .* port at most 65535"),
        ({"SAEJAX_HEARTBEAT_SECONDS": "0"}, "SAEJAX_HEARTBEAT_SECONDS = '0' must be a whole"),
        ({"SAEJAX_PROCESSES": None}, "SAEJAX_COORDINATOR = .* is set, but SAEJAX_PROCESSES is not"),
        ({"SAEJAX_LOCAL": "yes"}, r"SAEJAX_LOCAL = 'yes' must be a whole number in \[0, 1\]"),
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


def test_a_cluster_that_is_not_there_is_one_line():
    done = saejax(SAEJAX_PROCESSES="auto")
    assert done.returncode == 1
    assert done.stderr.startswith("saejax: error: SAEJAX_PROCESSES = 'auto', but JAX detects no ")
    assert done.stderr.count("\n") == 1 and "SAEJAX_COORDINATOR" in done.stderr


def test_a_host_without_an_address_is_refused_in_the_end(monkeypatch):
    def unknown(host, port):
        assert (host, port) == ("host0", 1234)
        raise OSError("Name or service not known")

    found = Settings(coordinator="host0:1234", count=4, index=3, wait_seconds=0)
    monkeypatch.setattr(preflight.socket, "getaddrinfo", unknown)
    with pytest.raises(processes.LostError, match=r"SAEJAX_COORDINATOR = 'host0:1234' cannot be r"):
        preflight.preflight(found, {})


@pytest.mark.parametrize(
    ("addresses", "local", "refused"),
    [
        (["10.0.0.1"], False, False),
        (["127.0.1.1", "10.0.0.1"], False, False),
        (["127.0.0.1", "::1"], False, True),
        (["127.0.0.1", "::1"], True, False),
        (["fe80::1%eth0"], False, False),
    ],
)
def test_a_coordinator_that_is_every_machine_itself_is_refused(
    monkeypatch, addresses, local, refused
):
    there = [(0, 0, 0, "", (address, 1234)) for address in addresses]
    monkeypatch.setattr(preflight.socket, "getaddrinfo", lambda host, port: there)
    found = Settings(coordinator="host0:1234", count=4, index=3, local=local)
    clock = preflight._Clock(found)
    if not refused:
        return preflight._resolve(found, clock)
    with pytest.raises(ValueError, match=r"'host0:1234' is this machine itself .*SAEJAX_LOCAL=1"):
        preflight._resolve(found, clock)


def test_what_is_waited_for_is_told_every_15_seconds(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(preflight.time, "monotonic", lambda: now[0])
    clock = preflight._Clock(Settings(coordinator="host0:1234", count=4, index=0))
    for seconds in (1, 14, 15, 16, 29, 47):
        now[0] = 100.0 + seconds
        clock.tell("processes 2, 3")
    assert caplog.messages == [
        f"process 0 of 4 (coordinator host0:1234) waits for processes 2, 3: {waited} s, at most "
        f"{900 - waited} more"
        for waited in (15, 47)
    ]


def test_what_differs_is_named_with_the_process():
    same = {"jax": "1", "saejax": "2"}
    assert preflight.differences({0: same, 1: dict(same)}) == ""
    text = preflight.differences({0: same, 1: same | {"jax": "3"}, 2: {"jax": "1"}})
    assert text.startswith(
        "process 1 has jax 3, and process 0 1; process 2 has saejax None, and process 0 2; start"
    )


# --- What JAX says --------------------------------------------------------------------------------


def two(monkeypatch):
    """As if this process were one of two."""
    for module in (group, losses):
        monkeypatch.setattr(module, "count", lambda: 2)
        monkeypatch.setattr(module, "index", lambda: 1)


GLOO = (
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection "
    "closed by peer [127.0.0.1]:2445"
)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(GLOO),
        jax.errors.JaxRuntimeError(GLOO),
        jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed\n\nRPC: /xla.coordination"),
        jax.errors.JaxRuntimeError(
            "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat "
            "timeout.\nmore"
        ),
        jax.errors.JaxRuntimeError(
            "INTERNAL: NCCL operation ncclAllReduce(send, recv, 3, type, comm) failed: unhandled"
        ),
        jax.errors.JaxRuntimeError("UNAVAILABLE: Slice 1 health check failed"),
    ],
)
def test_a_loss_is_named_with_what_jax_said_first(monkeypatch, error):
    two(monkeypatch)
    with pytest.raises(ConnectionError) as caught, processes.losses_named():
        raise error
    text = str(caught.value)
    assert text.startswith("process 1 of 2 lost another process") and "\n" not in text
    assert text.endswith(f"({str(error).splitlines()[0]})")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("workdir = /data/gloo_acts is not empty"),
        ValueError("the socket connection was reset by the coordination heartbeat of nccl"),
        RuntimeError("Connection closed by peer"),
        processes.LeaderError("process 0 failed: gloo"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while in gloo_acts"),
    ],
)
def test_other_errors_keep_their_words(monkeypatch, error):
    two(monkeypatch)
    with pytest.raises(type(error)) as caught, processes.losses_named():
        raise error
    assert caught.value is error


def test_a_folder_called_gloo_is_no_lost_process(monkeypatch, tmp_path):
    two(monkeypatch)
    (tmp_path / "gloo_acts").mkdir()
    (tmp_path / "gloo_acts/other.txt").touch()
    with pytest.raises(ValueError, match=r"not empty .other\.txt."), processes.losses_named():
        RunDirectory(tmp_path / "gloo_acts").claim({}, "", [])


def test_jax_has_what_the_processes_wait_with(monkeypatch):
    library = importlib.import_module("jax._src.lib")._jax
    for method in ("key_value_set", "blocking_key_value_get", "wait_at_barrier"):
        assert callable(getattr(library.DistributedRuntimeClient, method))
    assert group.client() is None, "this process has joined no others"
    monkeypatch.delattr("jax._src.distributed.global_state")
    with pytest.raises(RuntimeError, match=r"this jax has no .*global_state.client.*setup.py"):
        group.client()


# --- A parent and its child -----------------------------------------------------------------------

FATAL = "F1121 12:00:00.0 1 client.h:80] " + watching.FATAL


def watched(body: str, *, verbose: bool = False) -> subprocess.CompletedProcess:
    """Runs Python code as process 3 of 4 that never joins."""
    code = (
        "import os, signal, sys, time\nfrom saejax import processes\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup would have it ignored
        "def work():\n"
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


def test_an_abort_for_another_reason_is_not_a_loss():
    done = watched("os.abort()")
    assert done.returncode == 134 and "was ended by SIGABRT" in done.stderr


def test_an_unexpected_error_keeps_its_traceback():
    done = watched("raise RuntimeError('oh')")
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: oh\n")


@pytest.mark.parametrize(
    ("call", "says"),
    [("RegisterTask", "waited 900 s for all 4 to start"), ("PollForError", "lost another process")],
)
def test_an_abort_becomes_one_line(call, says):
    body = f"os.write(2, b'''{FATAL}: {call}\\n  @ 0x1 stack\\n''')\nos.abort()"
    done = watched(body)
    assert done.returncode == 124
    assert done.stderr.count("\n") == 1 and says in done.stderr
    assert done.stderr.startswith("saejax: error: process 3 of 4 (coordinator host0:1234)")
    assert "stack" in watched(body, verbose=True).stderr


def test_a_process_that_explained_itself_is_not_explained_again():
    line = "saejax: error: gone"
    for lines in ((line, FATAL), (FATAL, line)):
        text = "\\n".join(lines)
        done = watched(f"os.write(2, b'''{text}\\n''')\nos.abort()")
        assert (done.returncode, done.stderr) == (124, line + "\n")


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_interruption_before_training_is_one_line(name):
    default = "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"  # as before there is a handler
    done = watched(default + f"os.kill(os.getppid(), signal.{name})\ntime.sleep(60)")
    assert done.returncode == (42 if name == "SIGTERM" else 129)
    assert done.stderr == f"saejax: interrupted by {name}; the same command continues\n"


def test_alone_sigterm_before_training_is_one_line():
    code = (
        "import os, signal, sys\nfrom saejax import main\n"
        "main.run = lambda argv: os.kill(os.getpid(), signal.SIGTERM)\nmain.console()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 42
    assert done.stderr == "saejax: interrupted by SIGTERM; the same command continues\n"


def saejax(**env: str) -> subprocess.CompletedProcess:
    """The program, in a folder that cannot be."""
    return subprocess.run(
        [sys.executable, "-m", "saejax.main", "--gin_file=gin/synthetic.gin", "--workdir=/proc/x"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_a_place_that_is_none_is_left_to_join():
    done = saejax(**(FOUR | {"SAEJAX_PROCESS_ID": "9"}))
    assert done.returncode == 1
    assert done.stderr.startswith("saejax: error: SAEJAX_PROCESS_ID = '9' must be")
    assert done.stderr.count("\n") == 1
