"""Killed at any moment, by SIGKILL, a run comes back and ends bit by bit as one that was not."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from launch.local import environment, free_port
from saejax.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 60
BINDINGS = {
    "Synthetic.held_out_rows": 256,
    "Train.tokens": STEPS * 64,
    "Train.batch_size": 64,
    "Train.sample_rows": 256,
    "Train.log_every": 4,  # windows are open at most saves
    "Optimizer.warmup_steps": 10,
    "Loss.dead_tokens": 1000,  # latents die and are revived
    "Checkpoint.every_steps": 3,  # a save is in flight most of the time
    "Checkpoint.keep": 3,
    "Experiment.evaluation": None,
    "Experiment.report": None,
}


def start(workdir: pathlib.Path, processes: int) -> list[subprocess.Popen]:
    """The same command, as one process or as several that meet on a port of their own."""
    command = [
        *(sys.executable, "-m", "saejax.main", "--gin_file=gin/synthetic.gin"),
        f"--workdir={workdir}",
        *(f"--gin_bindings={name} = {value!r}" for name, value in BINDINGS.items()),
    ]
    port = free_port()
    environments = [dict(os.environ)]
    if processes > 1:
        environments = [environment(i, processes, 1, port) for i in range(processes)]
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    with log:
        return [
            # A session of its own: the process and its parent that watches it die together.
            subprocess.Popen(command, cwd=ROOT, env=e, stderr=log, start_new_session=True)
            for e in environments
        ]


def kill(running: list[subprocess.Popen], chance: random.Random) -> None:
    """All at once, or one of several, whose loss ends the others."""
    for process in chance.sample(running, chance.choice([len(running), 1])):
        os.killpg(process.pid, signal.SIGKILL)
    for process in running:
        process.wait(timeout=120)


def log_of(workdir: pathlib.Path) -> str:
    return (workdir.parent / f"{workdir.name}.log").read_text()


def finish(running: list[subprocess.Popen], workdir: pathlib.Path) -> None:
    try:
        codes = [process.wait(timeout=300) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert codes == [0] * len(running), log_of(workdir)


def outcome(workdir: pathlib.Path) -> tuple[dict, list[dict], list[str]]:
    """Digests of the end state, whose files are sound; the records but their times; the folders."""
    metadata = Checkpoints(workdir / "checkpoints").check_files(STEPS)
    times = ("tokens_per_second", "wait_share")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(s).items() if k not in times} for s in lines]
    return metadata["arrays"], records, sorted(p.name for p in (workdir / "checkpoints").iterdir())


class Survived(NamedTuple):
    """How often a run went on from a checkpoint, and how often a save was in flight at a kill."""

    resumed: int
    in_flight: int


def survive(workdir: pathlib.Path, processes: int, kills: int, chance: random.Random) -> Survived:
    """Kills a run so many times, at moments of chance, then lets it end."""
    folder, in_flight = workdir / "checkpoints", 0

    def entries() -> set[str]:
        return set(os.listdir(folder)) if folder.exists() else set()

    for _ in range(kills):
        before = entries()
        saves = chance.randrange(1, 5)  # a few are let pass, or the run would not get far
        running, begun = start(workdir, processes), time.monotonic()
        while len(entries() - before) < saves and all(p.poll() is None for p in running):
            assert time.monotonic() - begun < 240, log_of(workdir)
            time.sleep(0.003)
        time.sleep(chance.random() * 0.15)
        kill(running, chance)
        in_flight += any(name.endswith((".saving", ".removing")) for name in entries())
    finish(start(workdir, processes), workdir)
    return Survived(log_of(workdir).count("resuming at step"), in_flight)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """Folders of runs that nobody disturbed, by number of processes."""
    made = {}

    def of(processes: int):
        if processes not in made:
            workdir = tmp_path_factory.mktemp("quiet") / "run"
            finish(start(workdir, processes), workdir)
            made[processes] = workdir
        return made[processes]

    return of


def check(folder: pathlib.Path, quiet, processes: int, kills: int, seed: int) -> Survived:
    workdir = folder / f"run{seed}"
    survived = survive(workdir, processes, kills, random.Random(seed))
    expected, found = outcome(quiet(processes)), outcome(workdir)
    assert found[0] == expected[0], f"another end state (seed {seed})"
    assert found[1] == expected[1], f"other records (seed {seed})"
    assert [name for name in found[2] if not name.isdigit()] == [], "something is left over"
    assert "damaged" not in log_of(workdir), "a kill is no damage"
    return survived


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, quiet, processes):
    records = outcome(quiet(processes))[1]
    assert [record["step"] for record in records] == list(range(4, STEPS + 1, 4))
    assert check(tmp_path, quiet, processes, kills=2, seed=processes).resumed >= 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_killed_runs_end_as_one_that_was_not(tmp_path, quiet, processes):
    kills = [1 + i % 2 for i in range(20)]
    found = [check(tmp_path, quiet, processes, n, seed=100 + i) for i, n in enumerate(kills)]
    resumed, in_flight = sum(s.resumed for s in found), sum(s.in_flight for s in found)
    print(
        f"{processes} process(es): {len(found)} trials, {sum(kills)} kills, {in_flight} of them "
        f"with a save in flight, {resumed} resumes"
    )
    assert resumed >= 15 and in_flight >= 5


def damage(workdir: pathlib.Path, step: int) -> None:
    """Flips one bit of the largest file of a step."""
    file = max((workdir / f"checkpoints/{step}").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(data)


@pytest.mark.slow
def test_several_processes_leave_a_damaged_step_together(tmp_path, quiet):
    """Each reads its share of the files; what one of them finds, all act upon."""
    workdir = shutil.copytree(quiet(2), tmp_path / "run")
    for step in (57, 60):
        damage(workdir, step)
    finish(start(workdir, 2), workdir)
    log = log_of(workdir)
    assert log.count("is damaged, now") == 2 and "60.damaged-1: " in log, log
    assert "resuming at step 54" in log
    assert outcome(workdir)[:2] == outcome(quiet(2))[:2]
    for step in (54, 57, 60):
        damage(workdir, step)
    running = start(workdir, 2)
    assert [process.wait(timeout=120) for process in running] == [1, 1]
    assert log_of(workdir).count("saejax: error: no checkpoint in") >= 1
    assert not (workdir / "checkpoints/3").exists(), "training began anew"
