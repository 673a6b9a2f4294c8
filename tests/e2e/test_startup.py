"""What goes wrong when several processes start: one line each, the right exit code, all gone.

Real processes that join and part, and do nothing in between.
"""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest

from launch.local import free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys
from saejax import ending, processes
from saejax.processes import joining
def work():
    if "AS_JAX" in os.environ:
        import jax
        jax.__version__ = os.environ["AS_JAX"]
    joining._LEAST_SECONDS = 5
    processes.join({"k": os.environ.get("K")})
    with processes.losses_named():
        exec(os.environ.get("BETWEEN", ""))
        processes.part()
    print("joined", processes.count(), flush=True)
    return 0
sys.exit(processes.watched(lambda: ending.code_of(work)))
"""


def environment(index: int, port: int, count: int = 2, **more: str) -> dict[str, str]:
    own = {
        "SAEJAX_PROCESSES": str(count),
        "SAEJAX_PROCESS_ID": str(index),
        "SAEJAX_COORDINATOR": f"localhost:{port}",
        "SAEJAX_LOCAL": "1",
        "SAEJAX_WAIT_SECONDS": "60",
        "SAEJAX_HEARTBEAT_SECONDS": "10",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    return {k: v for k, v in {**os.environ, **own, **more}.items() if v}


def outcomes(*environments: dict[str, str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of processes that were started together."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM], env=env, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                )
            )
            for env in environments
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=120) for process in started]
        finally:
            for process in started:
                process.kill()
    assert all(gone(process.pid) for process in started), "a child outlived its parent"
    return [(process.returncode, *texts) for process, texts in zip(started, said)]


def gone(session: int) -> bool:
    """Whether no process of a session is left."""
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                return False
    return True


def assert_refused(outcome, pattern: str, code: int = 1) -> None:
    returncode, out, errors = outcome
    assert returncode == code, errors
    assert out == "" and errors.count("\n") == 1, errors
    assert re.match(f"saejax: error: {pattern}", errors), errors


def test_all_is_well():
    port = free_port()
    for returncode, out, errors in outcomes(*(environment(i, port, 3) for i in range(3))):
        assert (returncode, out, errors) == (0, "joined 3\n", "")


def test_a_missing_process_is_named_by_all_that_are_there():
    port = free_port()
    quick = {"SAEJAX_WAIT_SECONDS": "6"}
    first, second = outcomes(environment(0, port, 4, **quick), environment(2, port, 4))
    assert_refused(first, r"process 0 of 4 .* waited 6 s for processes 1, 3 to start;", 124)
    assert_refused(second, r"process 2 of 4 .*: process 0 waited 6 s for processes 1, 3 to", 124)


def test_a_missing_coordinator_is_named_with_its_port():
    port = free_port()
    (only,) = outcomes(environment(1, port, SAEJAX_WAIT_SECONDS="2"))
    assert_refused(
        only, r"process 1 of 2 .* waited 2 s for process 0 to start \(Connection refused\);", 124
    )
    assert f"open port {port} to all of them" in only[2]


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        first, second = outcomes(
            environment(0, port), environment(1, port, SAEJAX_WAIT_SECONDS="4")
        )
    assert_refused(first, rf"process 0 of 2 .* cannot listen at port {port} .*Address already in")
    assert_refused(second, r"process 1 of 2 .* waited 4 s for process 0", 124)


def test_a_stranger_at_the_port_is_no_process_0():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        env = environment(1, port)
        command = [sys.executable, "-c", PROGRAM]
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        connection, _ = other.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        _, errors = process.communicate(timeout=60)
        connection.close()
    assert process.returncode == 1 and errors.count("\n") == 1
    assert "is no process 0 that waits for others; the run may have begun" in errors


@pytest.mark.parametrize(
    ("counts", "wrong"), [((2, 3), 3), pytest.param((3, 2), 2, marks=pytest.mark.slow)]
)
def test_a_wrong_count_is_refused_by_all(counts, wrong):
    port = free_port()
    for outcome in outcomes(*(environment(i, port, n) for i, n in enumerate(counts))):
        assert_refused(
            outcome,
            rf"process 1 on \S+ \(pid \d+\) was told SAEJAX_PROCESSES = {wrong}, but process 0 "
            rf"{counts[0]}; give all of them the same number",
        )


def test_an_index_that_two_have_is_refused_by_all():
    port = free_port()
    for outcome in outcomes(*(environment(i, port, 3) for i in (0, 1, 1))):
        assert_refused(
            outcome, r"process 1 was started twice, on \S+ \(pid \d+\) and on \S+ \(pid \d+\); give"
        )


def test_a_second_process_0_is_told():
    port = free_port()
    one, other = outcomes(*(environment(0, port, SAEJAX_WAIT_SECONDS="5") for _ in range(2)))
    refused, waited = sorted((one, other), key=lambda outcome: outcome[0])
    assert_refused(refused, r"process 0 of 2 .* cannot listen .* a second process 0 may be there")
    assert_refused(waited, r"process 0 of 2 .* waited 5 s for process 1 to start", 124)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("AS_JAX", "0.0.1", r"process 1 has jax 0\.0\.1, and process 0 \S+; start all"),
        ("K", "17", r"process 1 has a configuration of hash \w+, and process 0 \w+; start all"),
    ],
)
def test_what_differs_is_refused_by_all(name, value, says):
    port = free_port()
    for outcome in outcomes(environment(0, port), environment(1, port, **{name: value})):
        assert_refused(outcome, says)


def test_a_loopback_coordinator_is_refused_unless_all_are_here():
    port = free_port()
    for outcome in outcomes(*(environment(i, port, SAEJAX_LOCAL="") for i in (0, 1))):
        assert_refused(outcome, rf"SAEJAX_COORDINATOR = 'localhost:{port}' is this machine itself")


def test_other_numbers_of_devices_are_refused_by_all():
    port = free_port()
    first = environment(0, port, 3, JAX_NUM_CPU_DEVICES="2")
    rest = [environment(i, port, 3, JAX_NUM_CPU_DEVICES="1") for i in (1, 2)]
    told = [outcome for outcome in outcomes(first, *rest) if "lost another" not in outcome[2]]
    assert told
    for outcome in told:
        assert_refused(outcome, r"process 0 has 2 device\(s\), and the others 1; give all")


@pytest.mark.slow
def test_a_late_twin_does_not_disturb_the_run():
    port = free_port()
    between = "import time; time.sleep(12)"
    command, pipe = [sys.executable, "-c", PROGRAM], subprocess.PIPE
    pair = [environment(i, port, BETWEEN=between) for i in (0, 1)]
    started = [subprocess.Popen(command, env=env, stdout=pipe, text=True) for env in pair]
    time.sleep(8)
    twin = subprocess.run(command, env=environment(1, port), capture_output=True, text=True)
    assert [p.communicate(timeout=60)[0] for p in started] == ["joined 2\n"] * 2
    assert_refused(
        (twin.returncode, twin.stdout, twin.stderr), r"process 1 of 2 .*: what answers at \S+ is no"
    )


def test_one_that_does_not_come_to_a_barrier_is_named():
    port = free_port()
    between = "processes.meet('the shards', 3)"
    absent = "import time; time.sleep(6)"
    where = [(0, between), (1, absent), (2, between)]
    here, late, there = outcomes(*(environment(i, port, 3, BETWEEN=b) for i, b in where))
    pattern = r"process {} of 3 waited 3 s at 'the shards' for process 1, which did not come;"
    assert_refused(here, pattern.format(0), 124)
    assert there[0] == late[0] == 124
    assert re.search(pattern.format(2), there[2]) or "lost another process" in there[2]


def test_a_leader_that_is_not_done_is_named():
    port = free_port()
    between = "processes.lead('evaluation', lambda: __import__('time').sleep(8), 3)"
    leader, waiting = outcomes(*(environment(i, port, BETWEEN=between) for i in (0, 1)))
    assert_refused(waiting, "process 1 of 2 waited 3 s at 'evaluation' for process 0, which", 124)
    assert leader[0] == 124


def test_an_interruption_of_the_leader_is_one_of_all():
    port = free_port()
    between = "processes.lead('evaluation', lambda: os.kill(os.getpid(), 15))"
    for code, out, errors in outcomes(*(environment(i, port, BETWEEN=between) for i in (0, 1))):
        assert (code, out) == (42, ""), errors
        assert errors == "saejax: interrupted by SIGTERM; the same command continues\n"
