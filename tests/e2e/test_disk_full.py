"""A disk that fills while training saves: told at once, nothing lost, the same end afterwards."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from saejax.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, EVERY = 60, 20
BINDINGS = {
    "SAE.n_latents": 4096,  # 8 MB of state
    "Synthetic.held_out_rows": 256,
    "Train.tokens": STEPS * 64,
    "Train.batch_size": 64,
    "Train.sample_rows": 256,
    "Train.log_every": 60,  # on a full disk, a record cannot be written either
    "Checkpoint.every_steps": EVERY,
    "Experiment.evaluation": None,
    "Experiment.report": None,
}


def command(workdir: pathlib.Path) -> list[str]:
    return [
        *(sys.executable, "-m", "saejax.main", "--gin_file=gin/synthetic.gin"),
        f"--workdir={workdir}",
        *(f"--gin_bindings={name} = {value!r}" for name, value in BINDINGS.items()),
    ]


# No `preexec_fn`: it forks, which JAX (whose threads other tests of this process started) warns of.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def run(workdir: pathlib.Path, file_limit: int | None = None) -> subprocess.CompletedProcess:
    """Trains; no file may grow beyond `file_limit` bytes, by order of the kernel."""
    words = command(workdir)
    if file_limit is not None:
        words = [sys.executable, "-c", LIMITED, str(file_limit), *words]
    # A library reports a failure of its own thread on stderr, before ours is told in one line.
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def arrays(workdir: pathlib.Path) -> dict:
    return Checkpoints(workdir / "checkpoints").check_files(STEPS)["arrays"]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("quiet") / "run"
    done = run(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def told(errors: str, step: int) -> str:
    (line,) = [s for s in errors.splitlines() if s.startswith("saejax: error: ")]
    assert f"checkpoint {step} could not be written" in line, errors
    return line


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_told_and_training_goes_on_later(quiet, tmp_path):
    workdir = shutil.copytree(quiet, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/60")  # it has 40 left
    before = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    done = run(workdir, file_limit=400_000)
    assert done.returncode == 1, done.stderr
    line = told(done.stderr, STEPS)
    assert "File too large" in line and "steps that are whole: 40" in line
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == before
    again = run(workdir)
    assert again.returncode == 0 and "resuming at step 40" in again.stderr, again.stderr
    assert arrays(workdir) == arrays(quiet)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["40", "60"]


# A disk of its own, with room for three states. While the step is compiled, something else takes
# the room of two; later it is gone.
SCRIPT = """
set -e
mount -t tmpfs -o size=30m tmpfs "$DISK"
set +e
"$@" 2> "$LOG" &
child=$!
until [ -e "$DISK/run/metrics.jsonl" ]; do sleep 0.01; kill -0 $child || break; done
dd if=/dev/zero of="$DISK/ballast" bs=1M count=15 2> /dev/null
wait $child
code=$?
ls "$DISK/run/checkpoints" > "$LOG.listing"
rm "$DISK/ballast"
"$@" 2> "$LOG.again"
again=$?
cp -r "$DISK/run" "$LOG.run"
echo $code $again
"""


def can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    probe = "d=$(mktemp -d) && mount -t tmpfs -o size=1m tmpfs $d && umount $d && rmdir $d"
    return subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True).returncode == 0


def test_a_disk_that_is_full_is_told_within_a_step_and_training_goes_on_later(quiet, tmp_path):
    if not can_mount():
        pytest.skip("only root may mount a disk of its own")
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", SCRIPT, "-", *command(disk / "run")],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "DISK": str(disk), "LOG": str(log)},
    )  # fmt: skip
    assert done.stdout.split() == ["1", "0"], (done, log.read_text())
    line = told(log.read_text(), 40)
    assert "No space left on device" in line and "steps that are whole: 20" in line
    assert "20" in (tmp_path / "log.listing").read_text().split()
    assert "resuming at step 20" in (tmp_path / "log.again").read_text()
    assert arrays(tmp_path / "log.run") == arrays(quiet)
