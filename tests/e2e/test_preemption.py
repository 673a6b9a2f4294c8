"""SIGTERM at any time, to any process: what is done is kept, exit code 42, the same end."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch.local import environment, free_port
from saejax.checkpoint import Checkpoints
from tests.e2e.test_startup import gone
from tests.e2e.test_stuck import HERE, flags

ALONE = {k: v for k, v in os.environ.items() if not k.startswith("SAEJAX")}
LONG = {"Train.tokens": 4000 * 64, "Experiment.evaluation": None, "Train.log_every": 50}
LONG |= {"Checkpoint.every_steps": 500}


def arguments(workdir, **bindings) -> list[str]:
    found = flags(workdir, **bindings)
    if bindings.get("Experiment.evaluation", 0) is None:
        found = [flag for flag in found if "Evaluation" not in flag]
    return found


def command(workdir, **bindings) -> list[str]:
    return [sys.executable, "-m", "saejax.main", *arguments(workdir, **bindings)]


def begin(command: list[str], env: dict[str, str] = ALONE) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=env, text=True, stderr=subprocess.PIPE, start_new_session=True
    )


def pair(workdir) -> list[subprocess.Popen]:
    port = free_port()
    return [begin(command(workdir, **LONG), environment(i, 2, 1, port)) for i in range(2)]


def wait_for(condition, *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        ended = [p.communicate()[1] for p in processes if p.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.05)


def records(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []


def end_of(workdir: pathlib.Path):
    """Digests of all arrays of the last checkpoint, and the records without their times."""
    store = Checkpoints(workdir / "checkpoints", alone=True)
    step = store.latest()
    times = ("tokens_per_second", "wait_share")
    kept = [{k: v for k, v in r.items() if k not in times} for r in records(workdir)]
    return step, store.metadata(step)["arrays"], kept


@pytest.mark.parametrize(
    "which", [[1], *(pytest.param(one, marks=pytest.mark.slow) for one in ([0], [0, 1]))]
)
def test_sigterm_to_any_of_two_stops_both_at_the_same_step(tmp_path, which):
    workdir = tmp_path / "run"
    group = pair(workdir)
    wait_for(lambda: records(workdir), *group)
    for index in which:
        group[index].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=240)[1] for process in group]
    assert [process.returncode for process in group] == [42, 42], said
    assert all(gone(process.pid) for process in group)
    store = Checkpoints(workdir / "checkpoints", alone=True)
    assert 0 < store.latest() < 4000 and "stopped and saved" in said[0]


@pytest.mark.slow
def test_two_that_were_stopped_end_as_those_that_were_not(tmp_path):
    def run_pair(workdir: pathlib.Path, stop: int | None) -> None:
        group, before = pair(workdir), len(records(workdir))
        if stop is not None:
            wait_for(lambda: len(records(workdir)) > before + 3, *group)
            group[stop].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=400)[1] for process in group]
        assert [p.returncode for p in group] == [0 if stop is None else 42] * 2, said

    run_pair(tmp_path / "quiet", None)
    for stop in (0, 1, 0, None):
        run_pair(tmp_path / "cut", stop)
    assert end_of(tmp_path / "quiet") == end_of(tmp_path / "cut")


@pytest.mark.parametrize(
    "seconds", [1.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.2, 3.0))]
)
def test_alone_before_training_it_leaves_at_once(tmp_path, seconds):
    process = begin(command(tmp_path / "run", **LONG))
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    # Before Python runs its first line, nobody can be heard: the signal ends the process.
    assert process.returncode == 42 or (seconds < 0.5 and process.returncode == -15), errors
    assert errors.count("\n") <= 2 and "Traceback" not in errors, errors


@pytest.mark.slow
def test_an_evaluation_is_left_and_done_again(tmp_path):
    workdir, short = tmp_path / "run", {"Train.tokens": 20 * 64}
    script = [sys.executable, str(HERE / "stuck.py"), "evaluation", "0", "--"]
    env = ALONE | {"PYTHONPATH": os.getcwd()}
    process = begin([*script, *arguments(workdir, **short)], env)
    wait_for(lambda: (workdir / "checkpoints/20").exists(), process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 42, errors
    assert errors.endswith("saejax: interrupted by SIGTERM; the same command continues\n")
    again = subprocess.run(command(workdir, **short), capture_output=True, text=True, env=ALONE)
    assert again.returncode == 0, again.stderr
    assert "resuming at step 20" in again.stderr and (workdir / "evaluation.json").exists()


@pytest.mark.slow
def test_a_harvest_is_left_and_continued(tmp_path):
    bindings = {"Harvest.tokens": 600_000, "Harvest.contexts_per_shard": 64}
    bindings |= {"Text.max_bytes": 4_000_000, "Harvest.held_out_tokens": 4000}
    call = [sys.executable, "-m", "saejax.main", "--gin_file=gin/harvest.gin"]
    call += [f"--workdir={tmp_path / 'run'}"]
    call += [f"--gin_bindings={name} = {value}" for name, value in bindings.items()]
    process = begin(call)
    committed = tmp_path / "run/activations"
    wait_for(lambda: committed.exists() and any(committed.glob("*/commits/*")), process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 42, errors
    assert errors.endswith("saejax: interrupted by SIGTERM; the same command continues\n")
    again = subprocess.run(call, capture_output=True, text=True, env=ALONE)
    assert again.returncode == 0, again.stderr


# --- The first process of a container -------------------------------------------------------------

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]


def may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_unshare(), reason="this machine gives nobody a process 1 of their own")
@pytest.mark.parametrize("when", ["at the start", "in training"])
@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_process_1_hears_it_too(tmp_path, when, several):
    workdir = tmp_path / "run"
    port = free_port()
    env = environment(0, 2, 1, port) if several else ALONE
    process = begin([*UNSHARE, *command(workdir, **LONG)], env)
    others = [begin(command(workdir, **LONG), environment(1, 2, 1, port))] if several else []
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: children.read_text().split(), process)
    if when == "in training":
        wait_for(lambda: records(workdir), process)
    else:
        time.sleep(2)
    os.kill(int(children.read_text().split()[0]), signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 42, errors
    for other in others:
        if when == "at the start":  # it would wait for process 0 to be started again
            other.send_signal(signal.SIGTERM)
        said = other.communicate(timeout=120)[1]
        assert other.returncode in ((42,) if when == "in training" else (42, -15)), said
    if when == "in training":
        assert Checkpoints(workdir / "checkpoints", alone=True).latest() > 0
