"""A run that was stopped and started again ends bit-identical to one that was not."""

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

from saejax.checkpoint import CheckpointConfig
from saejax.data.synthetic import Synthetic, SyntheticConfig
from saejax.fit import Recipe, fit
from saejax.loading import load
from saejax.mesh import MeshConfig
from saejax.model.sae import SAEConfig
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig

STEPS, BATCH = 12, 64
DATA = SyntheticConfig(features=64, d_model=16, mean_l0=3.0, held_out_rows=256)
FAST = {**os.environ, "XLA_FLAGS": ""}  # compiled as for users: it is worth it for so many steps


def recipe(**changes):
    parts = {
        "sae": SAEConfig(d_model=16, n_latents=64, k=4, normalization="scalar"),
        "train": TrainConfig(tokens=STEPS * BATCH, batch_size=BATCH, sample_rows=256, log_every=2),
        # Latents die and are revived within the run, so that the counters matter.
        "loss": LossConfig(dead_tokens=2 * BATCH, multi_topk_coefficient=1 / 8),
        "optimizer": OptimizerConfig(learning_rate=1e-2, decay="linear", ema_decay=0.9),
        "checkpoint": CheckpointConfig(every_steps=5, keep=None),
    }
    return Recipe(**(parts | changes))


def run(folder: pathlib.Path, stop_after: int | None = None, **changes):
    """Trains in `folder`; `stop_after` steps of this call, training is asked to stop."""
    folder.mkdir(exist_ok=True)
    asked = iter(range(1, STEPS + 1))
    return fit(
        recipe(**changes),
        Synthetic(DATA, BATCH),
        identity={"data": "synthetic"},
        checkpoints=folder / "checkpoints",
        write_to=folder,
        stop_requested=lambda: next(asked) == stop_after,
    )


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("tokens_per_second", "wait_share")
    return [{k: v for k, v in json.loads(s).items() if k not in times} for s in lines]


def assert_same_params(a, b):
    for name, value in a.params.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(b.params[name]), err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_stop_and_resume_is_bit_identical(tmp_path, uninterrupted, stop_after):
    whole_folder, whole = uninterrupted
    stopped = run(tmp_path / "split", stop_after=stop_after)
    assert stopped.stopped
    done = run(tmp_path / "split")
    assert not done.stopped
    assert_same_params(whole.sae, done.sae)
    assert whole.dead_fraction == done.dead_fraction
    assert_same_params(load(whole_folder), load(tmp_path / "split"))
    assert records(whole_folder) == records(tmp_path / "split"), "windows go on where they were"


def test_resumed_run_repeats_no_record(tmp_path):
    run(tmp_path / "run", stop_after=7)
    # A record of a step after the checkpoint, as a crash between log and save would leave.
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9}) + "\n{torn")
    run(tmp_path / "run")
    steps = [record["step"] for record in records(tmp_path / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def test_resume_on_another_mesh_restores_exactly(tmp_path):
    run(tmp_path / "run", stop_after=5)
    before = load(tmp_path / "run")
    done = run(tmp_path / "run", mesh=MeshConfig(mesh_shape=(2, 4)))
    assert not done.stopped
    assert len(done.sae.params["w_enc"].sharding.device_set) == 8
    assert_same_params(before, load(tmp_path / "run/checkpoints/5"))
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), done.sae.params))


def test_other_data_or_shape_is_refused(tmp_path):
    run(tmp_path / "run", stop_after=5)
    bigger = SAEConfig(d_model=16, n_latents=128, k=4, normalization="scalar")
    with pytest.raises(ValueError, match=r"w_dec is float32\[64, 16\].*needs float32\[128, 16\]"):
        run(tmp_path / "run", sae=bigger)
    with pytest.raises(ValueError, match="other activations"):
        fit(
            recipe(),
            Synthetic(DATA, BATCH),
            identity={"data": "something else"},
            checkpoints=tmp_path / "run/checkpoints",
            write_to=tmp_path / "run",
        )


def test_sigterm_saves_and_exits_42_and_the_same_command_continues(tmp_path):
    def command(workdir):
        bindings = [
            "SAE.n_latents = 128",
            "Train.tokens = 102_400",
            "Train.log_every = 10",
            "Train.sample_rows = 4096",
            "Synthetic.held_out_rows = 2048",
            "Experiment.report = None",
            "Experiment.evaluation = None",
        ]
        return [
            sys.executable,
            "-m",
            "saejax.main",
            "--gin_file=gin/synthetic.gin",
            f"--workdir={workdir}",
            *(f"--gin_bindings={binding}" for binding in bindings),
        ]

    quiet = subprocess.run(command(tmp_path / "quiet"), capture_output=True, text=True, env=FAST)
    assert quiet.returncode == 0, quiet.stderr
    process = subprocess.Popen(
        command(tmp_path / "cut"), stderr=subprocess.PIPE, text=True, env=FAST
    )
    metrics = tmp_path / "cut/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 42, errors
    again = subprocess.run(command(tmp_path / "cut"), capture_output=True, text=True, env=FAST)
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stderr
    assert_same_params(load(tmp_path / "quiet"), load(tmp_path / "cut"))
