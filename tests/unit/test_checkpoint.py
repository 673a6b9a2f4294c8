"""Checkpoints: what is read is what was written, or an error names what does not fit."""

import dataclasses
import errno
import os
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import digests
from saejax import mesh as mesh_lib
from saejax.checkpoint import CheckpointConfig, Checkpoints
from saejax.digests import DamageError
from saejax.loading import abstract_on
from saejax.mesh import MeshShape
from saejax.model.sae import SAEConfig
from saejax.train import state as state_lib
from saejax.train.optim import OptimizerConfig

SAE = SAEConfig(d_model=8, n_latents=16, k=2)


def make(sae=SAE, optimizer=OptimizerConfig(), mesh=MeshShape(), step=0):
    sample = np.random.default_rng(0).normal(size=(64, sae.d_model))
    state = state_lib.create(0, sae, optimizer, 100, sample, mesh_lib.make_mesh(mesh))
    # Values that no initialisation has: restoring a fresh state would not pass.
    return dataclasses.replace(
        state,
        step=state.step + step,
        tokens_since_fired=state.tokens_since_fired + jnp.arange(16)[: sae.n_latents],
        ema=jax.tree.map(lambda leaf: leaf + 0.25, state.ema),
    )


def at(state, step: int):
    return dataclasses.replace(state, step=state.step * 0 + step)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True)
    for (path, mine), other in pairs:
        name = jax.tree_util.keystr(path)
        assert mine.dtype == other.dtype, name
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other), err_msg=name)


def laid_out(shape: MeshShape):
    return abstract_on(mesh_lib.make_mesh(shape), SAE, OptimizerConfig(), 100)


def abstract_like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def anything(metadata) -> None:
    """Accepts the checkpoint of any run."""


@pytest.fixture(scope="module")
def state():
    return make(step=7)


@pytest.fixture
def store(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory, state) -> pathlib.Path:
    """A folder with the steps 1, 2 and 3; treat it as read-only."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    store = Checkpoints(folder)
    for step in (1, 2, 3):
        store.save(at(state, step), {"tokens": step})
    store.close()
    return folder


@pytest.fixture
def copy(three, tmp_path) -> pathlib.Path:
    return shutil.copytree(three, tmp_path / "copy")


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- What is saved comes back ---------------------------------------------------------------------


def test_a_state_survives(store, state):
    assert store.latest() is None
    store.save(state, {"note": "x", "nested": {"a": [1, 2.5, None]}})
    store.wait()
    assert store.latest() == 7
    again = Checkpoints(store.directory)
    metadata = again.metadata(7)
    assert (metadata["format"], metadata["step"], metadata["note"]) == (2, 7, "x")
    assert metadata["nested"] == {"a": [1, 2.5, None]}
    assert metadata["arrays"]["params.w_dec"]["shape"] == [16, 8]
    assert_equal(again.restore(7, abstract_like(make())), state)


def test_a_state_may_be_donated_as_soon_as_save_returns(store, state):
    """What is written is the state of that moment, whatever becomes of its buffers."""
    mine = jax.tree.map(lambda leaf: leaf + 0, state)
    wipe = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0 - 1, s), donate_argnums=0)
    jax.block_until_ready(wipe(jax.tree.map(jnp.copy, mine)))  # compiled beforehand
    store.save(mine, {})
    jax.block_until_ready(wipe(mine))
    store.wait()
    assert_equal(store.restore(7, abstract_like(state)), state)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_it_comes_back_in_the_layout_that_is_asked_for(three, state, devices):
    store = Checkpoints(three)
    for shape in mesh_lib.shapes_of(devices):
        wanted = laid_out(shape)
        restored = store.restore(2, wanted)
        assert restored.params["w_dec"].sharding == wanted.params["w_dec"].sharding
        shards = restored.params["w_dec"].addressable_shards
        assert [s.data.shape for s in shards] == [(16 // shape.latent, 8)] * devices
        assert_equal(restored, at(state, 2))


def test_what_one_layout_wrote_any_other_reads(tmp_path, state):
    store = Checkpoints(tmp_path)
    store.save(make(mesh=MeshShape(2, 4), step=7), {})
    store.wait()
    assert_equal(store.restore(7, laid_out(MeshShape(4, 2))), state)


def test_a_missing_step_names_those_that_are_there(three):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 5 in .*; present: \[1, 2, 3\]"):
        Checkpoints(three).metadata(5)


def test_another_format_is_refused_and_left_alone(copy, state):
    path = copy / "3/metadata.json"
    digests.write_sealed(path, digests.read_sealed(path) | {"format": 3})
    (copy / "4/metadata").mkdir(parents=True)
    for step, number in ((3, 3), (4, 1)):
        message = f"copy/{step} has format {number}; this version reads format 2"
        with pytest.raises(ValueError, match=message):
            Checkpoints(copy).metadata(step)
        with pytest.raises(ValueError, match=r"has format"):
            Checkpoints(copy).restore_newest(abstract_like(state), anything)
    assert names(copy) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("step", [7, 5])
def test_a_step_that_is_there_is_not_written_again(store, state, step):
    store.save(state, {"first": True})
    with pytest.raises(OSError, match=rf"checkpoint {step} could not be written .* is 7\)"):
        store.save(at(state, step), {"first": False})
    assert store.metadata(7)["first"] and names(store.directory) == ["7"]


# --- What is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [
        (1, None, [6]),
        (2, None, [5, 6]),
        (None, None, [1, 2, 3, 4, 5, 6]),
        (1, 3, [3, 6]),
        (1, 2, [2, 4, 6]),
        (2, 4, [4, 5, 6]),
    ],
)
def test_the_newest_are_kept_and_some_for_good(tmp_path, state, keep, every, left):
    store = Checkpoints(tmp_path / "checkpoints", keep, every)
    for step in range(1, 7):
        store.save(at(state, step), {})
    store.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == left


def test_steps_by_the_clock_are_kept_for_good_once_a_multiple(tmp_path, state):
    """The first step at or after each multiple, since the clock hits none of them."""
    store = Checkpoints(tmp_path / "checkpoints", 1, 10)
    for step in (4, 9, 13, 17, 19, 22, 31, 35):
        store.save(at(state, step), {})
    store.close()
    assert store.steps() == [13, 22, 31, 35]


def test_what_killed_processes_left_is_cleared_and_never_read(copy, state):
    shutil.copytree(copy / "3", copy / "4.saving")
    (copy / "3").rename(copy / "3.removing")
    store = Checkpoints(copy)
    assert store.steps() == [1, 2]
    assert store.restore_newest(abstract_like(state), anything)[0] == 2
    store.prepare(1)
    assert names(copy) == ["1", "2"]


def test_a_rollback_makes_later_steps_writable(copy, state):
    store = Checkpoints(copy, keep=3)
    store.truncate(1)
    assert names(copy) == ["1", "2.undone-1", "3.undone-1"]
    for step in (2, 3):
        store.save(at(state, step), {"again": True})
    store.close()
    assert store.steps() == [1, 2, 3] and store.metadata(3)["again"]
    store.truncate(2)
    assert names(copy) == ["1", "2", "2.undone-1", "3.undone-1", "3.undone-2"]


def test_a_disk_without_room_is_told_before_training(three, tmp_path, monkeypatch):
    usage = shutil.disk_usage(three)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    Checkpoints(tmp_path / "not/yet", keep=2).prepare(333)
    message = r"not/yet has 1,000 bytes free, but 3 more checkpoints of 334 bytes need 1,002"
    with pytest.raises(OSError, match=message):
        Checkpoints(tmp_path / "not/yet", keep=2).prepare(334)
    assert not (tmp_path / "not").exists()
    Checkpoints(three, keep=3).prepare(1000)  # those that are there make room for one another
    with pytest.raises(OSError, match=r"free, but 2 more checkpoints"):
        Checkpoints(three, keep=4).prepare(501)


# --- In the background ----------------------------------------------------------------------------


class Gate:
    """Holds a save in the background until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.error = threading.Event(), None
        write = digests.write_sealed

        def held(path, content):
            assert self.open.wait(60)
            if self.error:
                raise self.error
            write(path, content)

        monkeypatch.setattr(digests, "write_sealed", held)


def test_saves_overlap_with_steps_but_not_with_each_other(store, state, monkeypatch, caplog):
    gate = Gate(monkeypatch)
    store.save(state, {})
    store.check()  # still going on, nothing wrong
    assert store.steps() == [] and names(store.directory) == ["7.saving"]
    threading.Timer(1.2, gate.open.set).start()
    with caplog.at_level("INFO"):
        store.save(at(state, 8), {})
    assert store.steps()[:1] == [7]
    assert "for the checkpoint before to be written" in caplog.text
    store.wait()
    assert store.steps() == [7, 8]


@pytest.mark.parametrize("ask", ["check", "wait", "save", "close"])
def test_an_error_in_the_background_is_raised_at_the_next_occasion(store, state, monkeypatch, ask):
    store.save(at(state, 5), {})
    store.wait()
    gate = Gate(monkeypatch)
    gate.error = OSError(28, "No space left on device")
    store.save(state, {})
    store.check()
    gate.open.set()
    store._thread.join()
    calls = {"check": store.check, "wait": store.wait, "close": store.close}
    message = (
        r"checkpoint 7 could not be written to .* \(No space left on device\); steps that are "
        r"whole: 5\. Mend the cause"
    )
    with pytest.raises(OSError, match=message):
        calls.get(ask, lambda: store.save(at(state, 8), {}))()
    store.check()  # told once
    gate.error = None
    store.save(at(state, 8), {})
    store.wait()
    assert store.steps() == [5, 8], "after the cause is mended, saves go on"
    assert names(store.directory) == ["5", "8"], "and the unfinished one is cleared"


# --- Another run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (
            {"sae": SAEConfig(d_model=8, n_latents=12, k=2)},
            [
                r"params\.w_dec is float32\[16, 8\], the configuration needs float32\[12, 8\]",
                r"and \d+ more",
            ],
        ),
        ({"sae": SAEConfig(d_model=4, n_latents=16, k=2)}, [r"params\.pre_bias is float32\[8\]"]),
        (
            {"optimizer": OptimizerConfig(ema_decay=None)},
            [r"ema\.w_dec is float32\[16, 8\], the configuration needs absent"],
        ),
    ],
)
def test_another_shape_is_refused_by_name_and_is_no_damage(copy, wanted, found):
    """Nothing is cut, filled or cast to fit; each array is named."""
    sae, optimizer = wanted.get("sae", SAE), wanted.get("optimizer", OptimizerConfig())
    abstract = state_lib.abstract_state(sae, optimizer, 100)
    store = Checkpoints(copy)
    for read in (
        lambda: store.restore(3, abstract),
        lambda: store.restore_newest(abstract, anything),
    ):
        with pytest.raises(ValueError, match=r"copy/3 does not fit.*another workdir") as caught:
            read()
        for name in found:
            assert caught.match(name)
    assert names(copy) == ["1", "2", "3"]


def test_another_dtype_is_refused_by_name(three, state):
    wanted = abstract_like(state)
    narrow = jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=wanted.params["pre_bias"].sharding)
    wanted = dataclasses.replace(wanted, params=wanted.params | {"pre_bias": narrow})
    with pytest.raises(ValueError, match=r"params\.pre_bias is float32\[8\].* needs bfloat16\[8\]"):
        Checkpoints(three).restore(3, wanted)


def test_a_run_that_is_refused_is_no_damage(copy, state):
    def refuse(metadata):
        raise ValueError(f"tokens = {metadata['tokens']} is another run")

    with pytest.raises(ValueError, match="tokens = 3 is another run"):
        Checkpoints(copy).restore_newest(abstract_like(state), refuse)
    assert names(copy) == ["1", "2", "3"]


# --- The newest that is sound ---------------------------------------------------------------------


def test_nothing_saved_is_a_fresh_start(tmp_path, state):
    assert Checkpoints(tmp_path / "none").restore_newest(abstract_like(state), anything) is None
    assert not (tmp_path / "none").exists()


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_damaged_step_is_set_aside_with_its_reason_and_the_one_before_is_used(
    copy, state, caplog
):
    file = largest(copy / "3/state")
    flip(file, 100)
    store = Checkpoints(copy, keep=3)
    step, restored, metadata = store.restore_newest(abstract_like(state), anything)
    assert (step, metadata["tokens"]) == (2, 2)
    assert_equal(restored, at(state, 2))
    (record,) = caplog.records
    assert record.message.startswith("checkpoint 3 is damaged, now 3.damaged-1: ")
    assert f"{file} has CRC-32" in record.message and "\n" not in record.message
    assert names(copy) == ["1", "2", "3.damaged-1"]
    store.save(at(state, 3), {"tokens": 3})  # the step can be written anew
    store.wait()
    assert store.restore_newest(abstract_like(state), anything)[0] == 3


def test_where_none_is_sound_training_never_begins_anew(copy, state):
    for step in (1, 2, 3):
        (copy / str(step) / "metadata.json").unlink()
    for _ in range(2):  # not at the next start either
        with pytest.raises(OSError, match=r"no checkpoint in .* is sound: 1\.damaged-1, 2\.dam"):
            Checkpoints(copy).restore_newest(abstract_like(state), anything)
    assert names(copy) == ["1.damaged-1", "2.damaged-1", "3.damaged-1"]
    assert largest(copy / "1.damaged-1/state").stat().st_size > 1000, "nothing is deleted"


def test_arrays_that_are_not_what_was_saved_are_found_in_whole_files(copy, state):
    """A fault between the device and the file: all checksums of files are right."""
    path = copy / "3/metadata.json"
    metadata = digests.read_sealed(path)
    metadata["arrays"]["ema.w_enc"]["digest"] = "0123456789abcdef"
    digests.write_sealed(path, metadata)
    store = Checkpoints(copy)
    with pytest.raises(DamageError, match=r"array ema\.w_enc of .*copy/3 has digest [0-9a-f]{16},"):
        store.restore(3, abstract_like(state))
    assert store.restore_newest(abstract_like(state), anything)[0] == 2


def test_a_step_under_another_name_is_found(copy, state):
    (copy / "3").rename(copy / "9")
    assert Checkpoints(copy).restore_newest(abstract_like(state), anything)[0] == 2
    assert names(copy) == ["1", "2", "9.damaged-1"]


def test_what_this_user_may_not_read_is_no_damage(copy, state, monkeypatch):
    """A file without permission cannot be made by root: the call is replaced."""

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        Checkpoints(copy).restore_newest(abstract_like(state), anything)
    assert names(copy) == ["1", "2", "3"]


# --- Configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["read_bytes", "open"])
def test_what_cannot_be_read_for_now_is_no_damage(copy, state, monkeypatch, reader):
    """A disk that fails cannot be made here: the call is replaced."""
    whole = getattr(pathlib.Path, reader)

    def fail(self, *args, **options):
        if self.is_relative_to(copy):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return whole(self, *args, **options)

    monkeypatch.setattr(pathlib.Path, reader, fail)
    with pytest.raises(OSError, match="Input/output error"):
        Checkpoints(copy).restore_newest(abstract_like(state), anything)
    assert names(copy) == ["1", "2", "3"]


def test_what_cannot_be_deleted_yet_spoils_no_save(tmp_path, state, monkeypatch, caplog):
    """As where another process has a file of it open, on a network file system."""
    whole, busy = shutil.rmtree, [True]

    def rmtree(path, *args, **options):
        if busy[0] and str(path).endswith("1.removing"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        whole(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    store = Checkpoints(tmp_path / "run", keep=1)
    for step in (1, 2, 3):
        store.save(at(state, step), {})
        store.wait()
    assert names(tmp_path / "run") == ["1.removing", "3"]
    assert "1.removing cannot be deleted yet" in caplog.text
    busy[0] = False
    store.save(at(state, 4), {})
    store.close()
    assert names(tmp_path / "run") == ["4"]


def test_a_folder_that_cannot_be_listed_is_no_damage(copy, state, monkeypatch):
    """A disk that fails cannot be made here: the call is replaced."""
    whole = os.scandir

    def scandir(path="."):
        if str(path).startswith(str(copy / "3/")):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="Input/output error"):
        Checkpoints(copy).restore_newest(abstract_like(state), anything)
    assert names(copy) == ["1", "2", "3"]


def test_a_doubtful_step_replaces_none(tmp_path, state):
    store = Checkpoints(tmp_path / "run", keep=1)
    for step, doubtful in ((1, False), (2, True), (3, True)):
        store.save(at(state, step), {}, doubtful)
        store.wait()
    assert store.steps() == [1, 2, 3]
    store.save(at(state, 4), {})
    store.close()
    assert store.steps() == [4]


@pytest.mark.parametrize("field", ["every_steps", "keep", "keep_every"])
@pytest.mark.parametrize("value", [0, -1])
def test_wrong_values_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value} must be at least 1"):
        CheckpointConfig(**{field: value})


@pytest.mark.parametrize("value", [0, -1.5, float("nan")])
def test_wrong_seconds_are_refused(value):
    with pytest.raises(ValueError, match=f"every_seconds = {value} must be above 0"):
        CheckpointConfig(every_seconds=value)


def test_something_must_say_when_to_save():
    with pytest.raises(ValueError, match="nothing would be saved before the end"):
        CheckpointConfig(every_steps=None, every_seconds=None)
