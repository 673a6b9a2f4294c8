"""A checkpoint on a bad disk: whatever happens to any of its files is found before it is used."""

import dataclasses
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.checkpoint import Checkpoints
from saejax.digests import DamageError
from saejax.mesh import MeshShape
from saejax.model.sae import SAEConfig
from saejax.train import state as state_lib
from saejax.train.optim import OptimizerConfig
from saejax.types import TrainState

STEPS = (10, 20)


def make(step: int) -> TrainState:
    sae, mesh = SAEConfig(d_model=32, n_latents=64, k=2), mesh_lib.make_mesh(MeshShape())
    sample = np.random.default_rng(0).normal(size=(64, 32))
    state = state_lib.create(step, sae, OptimizerConfig(), 100, sample, mesh)
    return dataclasses.replace(state, step=state.step + step)


def abstract_like(state: TrainState) -> TrainState:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def anything(metadata) -> None:
    """Accepts the checkpoint of any run."""


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> pathlib.Path:
    """A folder with two steps; treat it as read-only."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    store = Checkpoints(folder)
    for step in STEPS:
        store.save(make(step), {"tokens": step})
    store.close()
    return folder


@pytest.fixture
def copy(two, tmp_path) -> pathlib.Path:
    return shutil.copytree(two, tmp_path / "copy")


def files_of(folder: pathlib.Path, step: int = 20) -> list[pathlib.Path]:
    found = [p for p in (folder / str(step)).rglob("*") if p.is_file()]
    return sorted(found, key=lambda p: (p.stat().st_size, p.name))


def classes(folder: pathlib.Path) -> set[str]:
    """File names of a step without the random ones of payloads and index nodes."""
    names = (p.name for p in files_of(folder))
    return {"payload or node" if len(n) == 32 else n for n in names}


def test_the_classes_of_files_are_known(two):
    """A new version of a library may bring others, for which the tests below must be looked at."""
    assert classes(two) == {
        "_CHECKPOINT_METADATA", "_METADATA", "_sharding", "commit_success.txt", "manifest.ocdbt",
        "metadata.json", "payload or node", "process_0",
    }  # fmt: skip


def assert_found(store: Checkpoints, file: pathlib.Path) -> None:
    with pytest.raises(DamageError) as caught:
        store.check_files(20)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def sweep(folder: pathlib.Path, flips_a_file: int, seed: int) -> int:
    """Flips single bits in every file, one at a time; each must be found and the file named."""
    store, chance, tried = Checkpoints(folder), random.Random(seed), 0
    for file in files_of(folder):
        data = file.read_bytes()
        ends = [0, len(data) - 1]
        offsets = [*ends, *(chance.randrange(len(data)) for _ in range(flips_a_file - 2))]
        for offset in offsets:
            flipped = bytearray(data)
            flipped[offset] ^= 1 << chance.randrange(8)
            file.write_bytes(flipped)
            assert_found(store, file)
            tried += 1
        file.write_bytes(data)
    store.check_files(20)
    return tried


def test_a_flipped_bit_in_any_file_is_found_and_named(copy):
    assert sweep(copy, 12, seed=0) >= 60


@pytest.mark.slow
def test_thousands_of_flipped_bits_are_found(copy):
    assert sweep(copy, 500, seed=1) >= 5000


def test_a_cut_emptied_lengthened_missing_or_added_file_is_found_and_named(copy):
    store = Checkpoints(copy)
    for file in files_of(copy):
        data = file.read_bytes()
        for wrong in (b"", data[: len(data) // 2], data[:-1], data + b"\0"):
            file.write_bytes(wrong)
            assert_found(store, file)
        file.unlink()
        assert_found(store, file)
        file.write_bytes(data)
        store.check_files(20)
    added = copy / "20/state/d/stray"
    added.write_text("x")
    assert_found(store, added)


def kinds(file: pathlib.Path):
    """What a fault may do to one file."""
    data = file.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    return {"flipped": bytes(flipped), "cut": data[: len(data) // 2], "emptied": b"", "gone": None}


@pytest.mark.parametrize("kind", ["flipped", "cut", "emptied", "gone"])
def test_after_any_fault_the_step_before_is_used(copy, kind):
    """The whole way through the ladder, for every file; nothing is lost, nothing else is moved."""
    abstract, count = abstract_like(make(0)), 0
    for file in files_of(copy):
        inside = file.relative_to(copy / "20")
        sound, damaged = file.read_bytes(), kinds(file)[kind]
        file.unlink() if damaged is None else file.write_bytes(damaged)
        step, state, metadata = Checkpoints(copy).restore_newest(abstract, anything)
        assert (step, metadata["tokens"], int(state.step)) == (10, 10, 10)
        (aside,) = copy.glob("20.damaged-*")
        (aside / inside).write_bytes(sound)
        aside.rename(copy / "20")
        count += 1
    assert count >= 10
    assert Checkpoints(copy).restore_newest(abstract, anything)[0] == 20


@pytest.mark.parametrize("gone", ["state", "state/ocdbt.process_0", "state/d", "metadata.json"])
def test_a_deletion_that_was_cut_short_is_found(copy, gone):
    """By another program: ours renames a step before it deletes anything in it."""
    path = copy / "20" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Checkpoints(copy).restore_newest(abstract_like(make(0)), anything)[0] == 10


def test_faults_in_every_step_stop_the_run(copy):
    for step in STEPS:
        file = files_of(copy, step)[-1]
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"is sound: 10\.damaged-1, 20\.damaged-1\. Training does"):
        Checkpoints(copy).restore_newest(abstract_like(make(0)), anything)
