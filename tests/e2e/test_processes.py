"""Several processes are one run: the same model, one set of logs, one end."""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch.local import environment, free_port
from saejax import mesh as mesh_lib
from saejax.checkpoint import Checkpoints
from saejax.model.sae import SAEConfig
from saejax.train import state as state_lib
from saejax.train.optim import OptimizerConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, DEAD_TOKENS = 20, 3072

# The rehearsal in everything but length.
SMALL = {
    "Train.tokens": STEPS * 1024,
    "Train.log_every": 4,
    "Train.sample_rows": 2048,
    "Checkpoint.every_steps": 10,
    "Loss.dead_tokens": DEAD_TOKENS,
    "Synthetic.held_out_rows": 512,
    "Evaluation.pca": False,
    "Evaluation.untrained": False,
}
TINY = {"SAE.n_latents": 512, "Train.microbatch_size": None, "Loss.auxk_coefficient": 0.0}


def flags(workdir, **bindings) -> list[str]:
    return [
        "--gin_file=gin/gpt4_16m_rehearsal.gin",
        f"--workdir={workdir}",
        *(f"--gin_bindings={name} = {value!r}" for name, value in (SMALL | bindings).items()),
    ]


def launcher(processes: int, devices: int, *arguments: str) -> list[str]:
    mine = [f"--processes={processes}", f"--devices_per_process={devices}"]
    return [sys.executable, "-m", "launch.local", *mine, "--", *arguments]


def launch(processes: int, devices: int, *arguments: str, code: int = 0) -> str:
    """Runs the launcher to its end; returns what it wrote to stderr."""
    done = subprocess.run(
        launcher(processes, devices, *arguments), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    return done.stderr


def final_state(workdir: pathlib.Path, step: int = STEPS):
    """The whole state of a checkpoint, and its metadata."""
    store = Checkpoints(workdir / "checkpoints")
    metadata = store.metadata(step)
    sae, optimizer = SAEConfig(**metadata["sae"]), OptimizerConfig(**metadata["optimizer"])
    abstract = state_lib.abstract_state(sae, optimizer, metadata["steps"])
    shardings = mesh_lib.tree_shardings(mesh_lib.make_mesh(mesh_lib.MeshShape()), abstract)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    state = jax.device_get(store.restore(step, abstract))
    store.close()
    return state, metadata


def assert_same_training(a: pathlib.Path, b: pathlib.Path) -> None:
    """The same selections in every step, hence states that differ by the rounding of sums."""
    (ours, ours_about), (theirs, theirs_about) = final_state(a), final_state(b)
    for name in ours_about.keys() - {"arrays", "config", "files", "mesh", "window"}:
        assert ours_about[name] == theirs_about[name], name
    np.testing.assert_array_equal(ours.tokens_since_fired, theirs.tokens_since_fired)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for mine, other in pairs:
        largest = np.abs(mine).max()
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * max(largest, 1e-6))


def records(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def made_once(factory, name: str, make) -> pathlib.Path:
    """A run that all workers of pytest-xdist share; `make` prints into the file beside it."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    workdir, printed = root / name, root / f"{name}.txt"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            printed.write_text(make(workdir))
    return workdir


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> pathlib.Path:
    """The run of one process with eight devices."""
    without = {"Experiment.report": None}
    return made_once(tmp_path_factory, "one", lambda w: launch(1, 8, *flags(w, **without)))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The run of two processes with four devices each, and what was printed."""
    workdir = made_once(tmp_path_factory, "two", lambda w: launch(2, 4, *flags(w)))
    return workdir, workdir.with_suffix(".txt").read_text()


# --- The same model -------------------------------------------------------------------------------


def test_two_processes_train_the_model_of_one(one, two):
    assert_same_training(one, two[0])
    state, metadata = final_state(one)
    assert metadata["selection"]["shards"] == 4
    assert metadata["selection"]["capacity"]["main"] < metadata["sae"]["k"], "exact is no rehearsal"
    assert any(record["auxk"] > 0 for record in records(one)), "nothing died: AuxK had no work"
    assert (state.tokens_since_fired >= DEAD_TOKENS).any()


@pytest.mark.slow
def test_four_processes_train_the_model_of_one(one, tmp_path):
    without = {"Experiment.evaluation": None, "Experiment.report": None}
    bindings = {k: v for k, v in SMALL.items() if not k.startswith("Evaluation")}
    arguments = [f"--gin_bindings={k} = {v!r}" for k, v in (bindings | without).items()]
    printed = launch(
        4, 2, "--gin_file=gin/gpt4_16m_rehearsal.gin", f"--workdir={tmp_path / 'run'}", *arguments
    )
    assert_same_training(one, tmp_path / "run")
    assert "done in" in printed and not (tmp_path / "run/evaluation.json").exists()


def test_there_is_one_set_of_logs(one, two):
    workdir, printed = two
    assert [record["step"] for record in records(workdir)] == list(range(4, STEPS + 1, 4))
    for mine, theirs in zip(records(one), records(workdir), strict=True):
        for name in mine.keys() - {"tokens_per_second", "wait_share"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert len(json.loads((workdir / "run.json").read_text())["starts"]) == 1
    assert (workdir / "report.html").exists() and (workdir / "config.gin").exists()
    mine, theirs = (json.loads((w / "evaluation.json").read_text()) for w in (one, workdir))
    assert mine["tokens"] == theirs["tokens"] == 512
    assert mine["nmse"] == pytest.approx(theirs["nmse"], rel=1e-5)
    lines = printed.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        f"{step}/{STEPS}" for step in range(4, STEPS + 1, 4)
    ]
    assert sum("done in" in line for line in lines) == 1
    assert not any(word in printed for word in ("Gloo", "Warning", "Error", "Traceback"))


def test_a_stop_is_agreed_and_the_run_goes_on_in_another_number_of_processes(one, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        launcher(2, 4, *flags(workdir, **{"Experiment.report": None})),
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and records(workdir), process)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[1]
    assert process.returncode == 42, printed
    assert "SIGTERM: finishing the step" in printed and "stopped and saved" in printed
    (step,) = (int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert records(workdir)[-1]["step"] <= step < STEPS
    printed = launch(1, 8, *flags(workdir, **{"Experiment.report": None}))
    assert f"resuming at step {step}" in printed
    assert_same_training(one, workdir)
    assert [record["step"] for record in records(workdir)] == list(range(4, STEPS + 1, 4))


def test_another_configuration_is_refused_once(two):
    workdir = two[0]
    before = (workdir / "config.json").read_text()
    printed = launch(2, 4, *flags(workdir, **{"SAE.k": 8}), code=1)
    assert printed.count("\n") == 1 and "another configuration (sae.k: 16 -> 8)" in printed
    assert (workdir / "config.json").read_text() == before


def test_a_mesh_that_is_not_all_devices_is_refused_once(tmp_path):
    printed = launch(2, 1, *flags(tmp_path / "run", **{"Mesh.mesh_shape": (1, 4)}), code=1)
    assert printed.count("\n") == 1, printed
    assert "asks for 4 devices, but 2 are present in 2 process(es)" in printed
    assert "use one of (1, 2), (2, 1), or 'auto'" in printed


# --- One that is not there ------------------------------------------------------------------------


def wait_for(condition, *processes: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [p.communicate() for p in processes if p.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.02)


@contextlib.contextmanager
def started(count: int, which: list[int], arguments: list[str], **more: str):
    """Processes as the environment starts them on a cluster, without the launcher."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "saejax.main", *arguments],
            cwd=ROOT, env=environment(index, count, 1, port) | more, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in which
    ]  # fmt: skip
    try:
        yield processes, port
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_one_that_never_starts_is_one_line(tmp_path):
    arguments = flags(tmp_path / "run")
    with contextlib.ExitStack() as stack:
        present = [
            stack.enter_context(started(2, [i], arguments, SAEJAX_WAIT_SECONDS="2")) for i in (0, 1)
        ]
        for index, ((process,), port) in enumerate(present):
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 124, errors
            assert out == "" and errors.count("\n") == 1, errors
            who = f"process {index} of 2 (coordinator localhost:{port})"
            assert errors.startswith(
                f"saejax: error: {who} waited 2 s for process {1 - index} to start"
            )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_that_is_killed_ends_the_others_with_one_line(tmp_path, victim):
    workdir = tmp_path / "run"
    arguments = flags(workdir, **TINY, **{"Mesh.mesh_shape": (1, 2), "Train.tokens": 10**8})
    with started(2, [0, 1], arguments) as (processes, _):
        wait_for(lambda: (workdir / "metrics.jsonl").exists() and records(workdir), *processes)
        processes[victim].kill()
        survivor = processes[1 - victim]
        began = time.monotonic()
        out, errors = survivor.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert survivor.returncode == 124 and out == "", errors
        told = [line for line in errors.splitlines() if not line.startswith("step ")]
        assert len(told) == 1, errors
        assert told[0].startswith(f"saejax: error: process {1 - victim} of 2")
        assert "lost another process" in told[0] and "the same command continues" in told[0]


@pytest.mark.slow
def test_an_unshared_workdir_with_an_old_run_is_refused_before_training(tmp_path):
    """Each process its own folder; the second holds what an earlier run has left there."""
    folders = [tmp_path / "first", tmp_path / "second"]
    folders[1].mkdir()
    for name, text in (("config.gin", "# old"), ("config.json", "{}"), ("run.json", "{}")):
        (folders[1] / name).write_text(text)
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "saejax.main", *flags(folder, **TINY)],
            cwd=ROOT, env=environment(index, 2, 4, port), text=True, stderr=subprocess.PIPE,
        )
        for index, folder in enumerate(folders)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes[::-1]][::-1]
    assert [process.returncode for process in processes] == [124, 1], errors
    assert errors[1].startswith(f"saejax: error: workdir = {folders[1]} of process 1 of 2 on ")
    assert "give all processes the same --workdir" in errors[1] and errors[1].count("\n") == 1
    assert "process 0 of 2" in errors[0] and "lost another process" in errors[0]
    assert "step " not in errors[0] and not (folders[0] / "checkpoints").exists()
