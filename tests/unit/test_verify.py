"""`--verify`: a table of everything a run directory holds, and the exit code that sums it up."""

import dataclasses
import hashlib
import pathlib
import shutil

import jax
import numpy as np
import pytest

from saejax import digests
from saejax import mesh as mesh_lib
from saejax.checkpoint import Checkpoints
from saejax.mesh import MeshShape
from saejax.model.sae import SAEConfig
from saejax.train import state as state_lib
from saejax.train.optim import OptimizerConfig
from saejax.verify import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """A run directory with two steps; treat it as read-only."""
    folder = tmp_path_factory.mktemp("run")
    sae, mesh = SAEConfig(d_model=8, n_latents=16, k=2), mesh_lib.make_mesh(MeshShape())
    sample = np.random.default_rng(0).normal(size=(64, 8))
    state = state_lib.create(0, sae, OptimizerConfig(), 100, sample, mesh)
    store = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        store.save(dataclasses.replace(state, step=state.step + step), {})
    store.close()
    return folder


@pytest.fixture
def run(made, tmp_path) -> pathlib.Path:
    return shutil.copytree(made, tmp_path / "run")


def contents(folder: pathlib.Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_sound_run_is_a_table_and_zero(run, capsys):
    before = contents(run)
    assert verify(run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"all {len(lines) - 1} sound"
    assert all(line.endswith("  sound") for line in lines[:-1])
    assert lines[0].startswith("checkpoint 2: ") and " files " in lines[0]
    arrays = [line for line in lines if "params.w_dec float32[16, 8]" in line]
    assert [line.split()[1] for line in arrays] == ["2:", "1:"]
    assert all(line.split()[-2] == "512" for line in arrays), "bytes"
    assert contents(run) == before


def test_what_is_damaged_is_named_and_left_alone(run, capsys):
    file = max((run / "checkpoints/2").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[50] ^= 1
    file.write_bytes(data)
    before = contents(run)
    assert verify(run) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("checkpoint 2 ") and f"{file} has CRC-32" in lines[0]
    assert lines[1].startswith("checkpoint 1: ") and lines[-1].endswith("looked at, 1 damaged")
    assert contents(run) == before


def test_an_array_that_its_files_do_not_show_is_named(run, capsys):
    path = run / "checkpoints/1/metadata.json"
    metadata = digests.read_sealed(path)
    metadata["arrays"]["variance"]["digest"] = "0" * 16
    digests.write_sealed(path, metadata)
    assert verify(run) == 1
    wrong = [s for s in capsys.readouterr().out.splitlines() if "digest is not the one" in s]
    assert len(wrong) == 1 and wrong[0].startswith("checkpoint 1: variance float32[]")


def test_nothing_to_look_at_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither checkpoints nor activations"):
        verify(tmp_path)


def test_where_all_steps_were_set_aside_it_is_not_sound(run, capsys):
    for step in (1, 2):
        (run / f"checkpoints/{step}").rename(run / f"checkpoints/{step}.damaged-1")
    assert verify(run) == 1
    assert "none is whole: 1.damaged-1, 2.damaged-1" in capsys.readouterr().out


def test_an_array_that_cannot_be_read_is_a_line_and_the_rest_follows(run, capsys, monkeypatch):
    whole = Checkpoints.array_is_sound

    def read(self, step, metadata, name):
        if step == 2 and name == "params.w_dec":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return whole(self, step, metadata, name)

    monkeypatch.setattr(Checkpoints, "array_is_sound", read)
    assert verify(run) == 1
    out = capsys.readouterr().out
    assert "cannot be read: RESOURCE_EXHAUSTED" in out and "checkpoint 1: " in out


def test_a_step_that_goes_while_it_is_read_is_no_damage(run, capsys, monkeypatch):
    whole = Checkpoints.check_files

    def read(self, step):
        if step == 1:
            shutil.rmtree(run / "checkpoints/1")
        return whole(self, step)

    monkeypatch.setattr(Checkpoints, "check_files", read)
    assert verify(run) == 0
    assert "checkpoint 1" not in capsys.readouterr().out
