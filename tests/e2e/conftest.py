"""One small run of the quickstart, made once by the command itself, that several tests look at."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The quickstart in everything but size: its subject, its site, its text, all its stages.
SMALL = """
Text.max_bytes = 150_000
Harvest.contexts_per_shard = 64
Harvest.held_out_tokens = 8000
SAE.n_latents = 256
SAE.k = 8
Mesh.mesh_shape = (1, 1)
Train.tokens = 30_720
Train.batch_size = 256
Train.sample_rows = 2048
Train.log_every = 40
Optimizer.warmup_steps = 10
Loss.dead_tokens = 5000
Checkpoint.every_steps = 50
Evaluation.pca_tokens = 4096
Evaluation.downstream_tokens = 2048
Evaluation.batch_size = 1024
Report.latents = 6
"""


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """Where the run was started, its directory, its command line, and what it printed."""

    home: pathlib.Path
    path: pathlib.Path
    flags: list[str]
    stderr: str


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> SmallRun:
    """A finished `runs/quickstart` in a scratch directory; treat it as read-only."""
    home = tmp_path_factory.mktemp("home")
    (home / "small.gin").write_text(SMALL)
    flags = ["--gin_file=gin/quickstart.gin", "--gin_file=small.gin"]
    done = subprocess.run(
        [sys.executable, "-m", "saejax.main", *flags],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return SmallRun(home=home, path=home / "runs/quickstart", flags=flags, stderr=done.stderr)
