"""A process that is stuck, wherever it is, ends in time with its stack, and the others with it."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from launch.local import environment, free_port
from tests.e2e.test_startup import gone

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = {"start": 30, "restore": 15, "compile": 12, "step": 12, "save": 12, "evaluation": 12}
SMALL = {
    "SAE.n_latents": 64,
    "SAE.k": 4,
    "Synthetic.features": 64,
    "Synthetic.d_model": 16,
    "SAE.d_model": 16,
    "Synthetic.held_out_rows": 256,
    "Train.tokens": 20 * 64,
    "Train.batch_size": 64,
    "Train.sample_rows": 256,
    "Train.log_every": 2,
    "Checkpoint.every_steps": 5,
    "Experiment.report": None,
    "Evaluation.pca": False,
}


def flags(workdir, **bindings) -> list[str]:
    return [
        "--gin_file=gin/synthetic.gin",
        f"--workdir={workdir}",
        *(f"--gin_bindings={name} = {value!r}" for name, value in (SMALL | bindings).items()),
    ]


def start(place: str, stuck: int, index: int, count: int, port: int, workdir):
    env = environment(index, count, 1, port) | {"PYTHONPATH": os.getcwd()}
    if count == 1:
        env = {k: v for k, v in env.items() if not k.startswith("SAEJAX")}
    arguments = flags(workdir, **{f"Watchdog.{place}_seconds": SECONDS[place]})
    return subprocess.Popen(
        [sys.executable, str(HERE / "stuck.py"), place, str(stuck), "--", *arguments],
        env=env, text=True, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("place", "stuck", "count"),
    [
        ("start", 1, 2),  # alone, nobody waits for the claim
        slow("restore", 0, 1),
        slow("restore", 1, 2),
        slow("compile", 0, 1),
        ("step", 0, 1),
        ("save", 1, 2),
        slow("step", 0, 2),
        slow("save", 0, 1),
        slow("step", 1, 2),
        slow("evaluation", 0, 1),
        slow("evaluation", 0, 2),
    ],
)
def test_a_stuck_process_ends_all_in_time(tmp_path, place, stuck, count):
    port, began = free_port(), time.monotonic()
    group = [start(place, stuck, i, count, port, tmp_path / "run") for i in range(count)]
    try:
        said = [process.communicate(timeout=240)[1] for process in group]
    finally:
        for process in group:
            process.kill()
    assert time.monotonic() - began < 120 + SECONDS[place]
    assert [process.returncode for process in group] == [124] * count, said
    assert all(gone(process.pid) for process in group)
    assert f"has been in the phase {place!r} for" in said[stuck], said[stuck]
    assert "in stuck_here" in said[stuck]
