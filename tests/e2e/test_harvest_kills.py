"""Real harvest processes, killed at random moments: the store ends as if nothing had happened."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from saejax.data.shards import open_store

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINDINGS = {
    "Harvest.context_length": 16,
    "Harvest.tokens": 12_000,
    "Harvest.contexts_per_shard": 4,
    "Harvest.batch_contexts": 4,
    "Harvest.sites": ("0.mlp_out",),
    "Text.held_out_percent": 20.0,
    "Text.tails": "pad",
    "Text.min_tail": 4,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Three dozen short modules, whose tails are padded."""
    folder = tmp_path_factory.mktemp("text")
    source = "".join(
        f"def f_{i}(x):\n    '''Adds {i}.'''\n    return x + {i}\n\n" for i in range(60)
    )
    for i in range(36):
        (folder / f"m{i:02}.py").write_text(f"import m{i}\n\n" + source[i * 37 :])
    return folder


@pytest.fixture(scope="module")
def start(text):
    """Starts the harvest command on a folder."""
    bindings = {**BINDINGS, "Text.source": str(text)}
    flags = [f"--gin_bindings={name} = {value!r}" for name, value in bindings.items()]

    def begin(workdir):
        command = [sys.executable, "-m", "saejax.main", "--gin_file=gin/harvest.gin", *flags]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def finish(process):
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


@pytest.fixture(scope="module")
def clean(start, tmp_path_factory):
    """The stores of a harvest that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("clean")
    finish(start(workdir))
    return workdir


def content(workdir):
    """Every file of the stores but for locks that a killed writer left."""
    root = workdir / "activations"
    files = [p for p in root.rglob("*") if p.is_file() and "__lock" not in p.name]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def commits(workdir):
    return sum(1 for _ in workdir.glob("activations/*/*/commits/*.json"))


def kill_at_random(start, workdir, rng, writers, total, early):
    """Starts some writers, kills them, and tells whether they were at work.

    `early` is the share of kills before a record was written, most of a small harvest's time.
    """
    before = commits(workdir)
    processes = [start(workdir) for _ in range(writers)]
    deadline = time.monotonic() + (rng.uniform(0.5, 6) if rng.random() < early else 120)
    while commits(workdir) == before and time.monotonic() < deadline:
        if all(process.poll() is not None for process in processes):
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    struck = 0
    for process in processes:
        time.sleep(rng.choice([0, 0, rng.uniform(0, 0.05)]))
        struck += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert before <= commits(workdir) <= total
    return struck > 0


def check_equal(workdir, clean):
    assert content(workdir) == content(clean)
    for site in ("1.resid_post", "0.mlp_out"):
        for split in ("train", "held_out"):
            store = open_store(workdir / "activations" / site / split)
            store.verify()
            tables = [store.read_contexts(shard) for shard in store.committed()]
            ids = np.concatenate(tables)[:, 0]
            assert len(np.unique(ids)) == len(ids) == store.manifest["contexts"]
            rows = sum(store.record(shard)["rows"] for shard in store.committed())
            assert store.n_rows == rows == sum(len(part) for part, _, _ in store.rows())
            assert store.manifest["left_out"]["padding"] > 0


def trials(start, clean, workdir, writers, kills, early=0.0):
    rng, struck, total = random.Random(writers), 0, commits(clean)
    partial = []
    for _ in range(kills):
        struck += kill_at_random(start, workdir, rng, writers, total, early)
        partial.append(commits(workdir))
    for process in [start(workdir) for _ in range(writers)]:
        finish(process)
    check_equal(workdir, clean)
    return struck, partial, total


@pytest.mark.parametrize("writers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_harvests_end_in_the_same_store(start, clean, tmp_path, writers):
    struck, partial, total = trials(start, clean, tmp_path / "run", writers, kills=2)
    assert struck and 0 < partial[-1] < total, partial


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 2])
def test_twenty_kills_end_in_the_same_store(start, clean, tmp_path, writers):
    struck, partial, total = trials(start, clean, tmp_path / "run", writers, 20, early=0.2)
    print(f"{struck} of 20 trials struck writers at work; records then: {partial} of {total}")
    assert struck >= 15


def test_two_commands_at_once_share_the_work(start, clean, tmp_path):
    for process in [start(tmp_path / "run") for _ in range(2)]:
        finish(process)
    check_equal(tmp_path / "run", clean)
