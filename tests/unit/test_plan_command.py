"""`--dry_run --topology=...` from a shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = """
include 'gin/base.gin'
Experiment.data = @Stored()
Stored.path = 'nowhere'
SAE.d_model = 16
SAE.n_latents = 128
SAE.k = 4
Loss.auxk_coefficient = 0.0
Train.tokens = 1024
Train.batch_size = 64
"""


def saejax(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    # A platform that does not exist: whoever asks JAX for what is present fails here.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "nowhere"}
    command = [sys.executable, "-m", "saejax.main", *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("saejax: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert [w for w in words if w not in done.stderr] == []


def test_hardware_that_is_absent_is_planned_for_without_touching_what_is_present(tmp_path):
    done = saejax(
        "--gin_file=gin/gpt4_16m.gin", "--dry_run", "--topology=gpu:A100x512", cwd=tmp_path
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "\nmesh        data 1 x latent 512 = 512 devices\n" in done.stdout
    assert "\nmemory      fits: the estimate takes " in done.stdout
    assert re.search(r"^  auxk residual +all-gather +latent +16 ", done.stdout, re.MULTILINE)
    (candidates,) = re.findall(r"^  candidates +all-to-all +latent +16 +(\S+)", done.stdout, re.M)
    assert float(candidates) < 4  # MB
    assert re.search(
        r"^recommended \(analytic\)\n  Mesh.mesh_shape = \(\d+, \d+\)\n"
        r"  Train.microbatch_size = \d+$",
        done.stdout,
        re.MULTILINE,
    )
    assert list(tmp_path.iterdir()) == []


def test_forced_cpu_devices_are_compiled_for(tmp_path):
    (tmp_path / "tiny.gin").write_text(TINY)
    flags = ("--gin_file=tiny.gin", "--dry_run", "--topology=cpu:4")
    done = saejax(*flags, "--gin_bindings=Mesh.mesh_shape = (2, 2)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "source      memory and collectives of the step compiled for it" in done.stdout
    assert "collectives, per device and step (compiled, all latents dead" in done.stdout
    assert done.stderr == "compiling 2 x 2 for cpu:4 ...\n"
    done = saejax(*flags, "--gin_bindings=Mesh.mesh_shape = (1, 8)", cwd=tmp_path)
    assert_one_line(done, "--topology=cpu:4 has 4", "(1, 4), (2, 2), (4, 1)", "'auto'")


def test_bad_topologies_are_one_line(tmp_path):
    run = "--gin_file=gin/gpt4_16m.gin"
    done = saejax(run, "--dry_run", "--topology=v9:8x8", cwd=tmp_path)
    assert_one_line(done, "--topology=v9:8x8 is not known", "v5p:8x8x8", "gpu:H100x512", "cpu:8")
    assert_one_line(saejax(run, "--topology=v5p:8x8x8", cwd=tmp_path), "add --dry_run")
