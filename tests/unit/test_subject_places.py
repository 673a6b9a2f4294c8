"""Where a run keeps the weights of its subject: on the devices, as they load, and nowhere else."""

import dataclasses
import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.data.corpus import TextConfig
from saejax.data.loader import LoaderConfig
from saejax.model.sae import SAEConfig
from saejax.run import Experiment
from saejax.sources import StoredConfig, open_source
from saejax.subjects.base import Subject
from saejax.subjects.filling import own_mesh
from saejax.subjects.harvest import HarvestConfig, harvest
from saejax.subjects.hf import load_subject
from saejax.subjects.request import open_subject
from saejax.subjects.streaming import StreamConfig

SITE = "1.resid_post"
SAE = SAEConfig(d_model=192, n_latents=256, k=8)
BATCH = 64


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        functions = (f"def f_{i}_{j}(x):\n    return x + {i * j}\n\n" for j in range(20))
        (folder / f"m{i}.py").write_text("".join(functions))
    return HarvestConfig(
        site=SITE,
        context_length=16,
        batch_contexts=8,
        contexts_per_shard=32,
        tokens=1000,
        held_out_tokens=500,
        text=TextConfig(source=str(folder), held_out_percent=20.0),
    )


def mesh_of(devices):
    return mesh_lib.make_mesh(mesh_lib.MeshShape(1, devices), jax.devices()[:devices])


def opened(data, folder, devices=1):
    return open_source(data, SAE, LoaderConfig(), BATCH, folder, mesh_of(devices))


def buffers(array):
    return {s.device: s.data.unsafe_buffer_pointer() for s in array.addressable_shards}


def subjects():
    """Every subject there is, with all of its arrays."""
    gc.collect()
    alive = [x for x in gc.get_objects() if isinstance(x, Subject)]
    return {id(one): jax.tree.leaves(one.params) for one in alive}


def test_places_that_hold_a_shard_keep_it():
    mesh = mesh_lib.subject_mesh(mesh_of(8), 2)
    whole = load_subject("embedded")
    split = load_subject("embedded", mesh=mesh)
    assert (
        split.place(mesh_lib.subject_mesh(mesh_of(8), 2)).params["embed"] is split.params["embed"]
    )
    q = split.params["layers"][0]["q"]["kernel"]
    for other in (own_mesh(2, 1), own_mesh(2, 3)):
        there = split.place(other).params["layers"][0]["q"]["kernel"]
        assert there.sharding.mesh == other
        assert buffers(there).items() <= buffers(q).items(), "copied, though it was there"
    alone = load_subject("embedded", mesh=own_mesh(2, 1))
    groups = np.array(jax.devices()).reshape(-1, 2)[::-1, ::-1]
    wide = jax.sharding.Mesh(groups, ("data", "latent"))  # what it has, and in another order
    for made in (alone.place(wide), split.place(own_mesh(4, 2)), alone.place(own_mesh(1, 1))):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(made.params))
        jax.tree.map(np.testing.assert_array_equal, made.params, whole.params)
    kept = [getattr(x, "_npy_value", None) for x in jax.tree.leaves(alone.params)]
    assert not any(value is not None for value in kept), "cutting otherwise leaves a host copy"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_subject_of_a_stream_is_on_its_mesh_and_nowhere_else(config, tmp_path, shards, dtype):
    before = subjects()
    asked = dataclasses.replace(config, subject_shards=shards, weights_dtype=dtype)
    source = opened(StreamConfig(harvest=asked, lanes=4, buffer_batches=2), tmp_path, 4)
    mesh = mesh_lib.subject_mesh(mesh_of(4), shards)
    params = source.batches.stream._params
    q = params["layers"][0]["q"]["kernel"]
    path = ("layers", 0, "q", "kernel")
    assert q.sharding == mesh_lib.subject_sharding(mesh, path, q.shape)
    assert q.addressable_shards[0].data.shape == (192, 192 // shards)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    evaluated = source.inputs().subject
    assert evaluated is source.subject() is source.inputs().subject  # made once
    devices = jax.local_devices()[:shards]
    for one, all_of_it in zip(jax.tree.leaves(evaluated.params), jax.tree.leaves(params)):
        assert one.sharding.device_set == set(devices)
        assert buffers(one) == {device: buffers(all_of_it)[device] for device in devices}
    new = [leaves for key, leaves in subjects().items() if key not in before]
    assert new and not any(isinstance(x, np.ndarray) for leaves in new for x in leaves)


def test_the_subject_of_a_harvest_leaves_the_devices_to_the_training(config, tmp_path):
    def embeddings():
        gc.collect()
        return [x for x in jax.live_arrays() if x.shape == (4096, 192)]

    asked, before, known = dataclasses.replace(config, subject_shards=2), embeddings(), subjects()
    source = opened(asked, tmp_path, 4)
    assert len(embeddings()) == len(before)
    assert not any(leaves for key, leaves in subjects().items() if key not in known)
    params = source.subject().params
    assert {x.sharding.mesh for x in jax.tree.leaves(params)} == {own_mesh(2, 1)}
    jax.tree.map(np.testing.assert_array_equal, params, load_subject("embedded").params)
    host = dataclasses.replace(config, subject_shards=9)
    for data in (host, StreamConfig(harvest=host, lanes=4)):
        with pytest.raises(ValueError, match=r"subject_shards = 9.*(8 devices|the 4 devices)"):
            opened(data, tmp_path / "no", 4)
    assert not (tmp_path / "no").exists()


def test_weights_in_bfloat16_are_another_subject(config, tmp_path, monkeypatch):
    half = dataclasses.replace(config, weights_dtype="bfloat16")
    stores = {}
    for cfg in (config, half):
        stores[cfg.weights_dtype] = harvest(cfg, tmp_path / cfg.weights_dtype, str)[SITE][0]
    one, other = (store.spec for store in stores.values())
    assert one.compute_dtype == other.compute_dtype == "float32"
    assert one.subject_fingerprint != other.subject_fingerprint
    # The file holds bfloat16, so the activations are the same.
    np.testing.assert_array_equal(*(s.read_shard_rows(0).rows for s in stores.values()))
    with pytest.raises(ValueError, match=r"another spec \(subject_fingerprint: stored '\w+', wan"):
        harvest(half, tmp_path / "float32", str)
    read = []

    def load(name, *, dtype, **options):
        read.append(dtype)
        return load_subject(name, dtype=dtype, **options)

    monkeypatch.setattr("saejax.sources.load_subject", load)
    for dtype, store in stores.items():  # a run on the stores is told which it was
        made = opened(StoredConfig(path=str(tmp_path / dtype), subject="embedded"), tmp_path)
        assert read.pop() == dtype and read == []
        assert made.subject().fingerprint == store.spec.subject_fingerprint
        assert made.subject().params["embed"].dtype == jnp.dtype(dtype)
        assert made.inputs().subject is made.subject()


def test_other_weights_than_the_store_has_are_named_in_both_precisions(
    config, tmp_path, monkeypatch
):
    harvest(config, tmp_path, str)
    real = load_subject("embedded")

    def load(name, *, dtype, **_):
        return dataclasses.replace(real, fingerprint=f"of {dtype}")

    monkeypatch.setattr("saejax.sources.load_subject", load)
    with pytest.raises(ValueError, match=r"has of float32 in float32 and of bfloat16 in bfloat16;"):
        opened(StoredConfig(path=str(tmp_path), subject="embedded"), tmp_path)
    with pytest.raises(ValueError, match=r"Stored\.subject_shards = 0: must be at least 1"):
        StoredConfig(path=str(tmp_path), subject_shards=0)
    with pytest.raises(ValueError, match=r"Stored\.subject_shards = 2: .* runs outside JAX"):
        StoredConfig(path=str(tmp_path), subject="torch:x/y", subject_shards=2)


def test_the_precision_of_weights_is_a_setting(config):
    for dtype in ("float32", "bfloat16"):
        asked = dataclasses.replace(config, weights_dtype=dtype, dtype="float32")
        for subject in (open_subject(asked), open_subject(asked, on_devices=True)):
            assert {x.dtype for x in jax.tree.leaves(subject.params)} == {jnp.dtype(dtype)}
    with pytest.raises(ValueError, match=r"Harvest\.weights_dtype = 'float16': 'float32' or"):
        dataclasses.replace(config, weights_dtype="float16")
    dataclasses.replace(config, subject="torch:x/y", weights_dtype="bfloat16", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"weights_dtype = 'bfloat16' with Harvest\.dtype = 'fl"):
        dataclasses.replace(config, subject="torch:x/y", weights_dtype="bfloat16")


def test_without_downstream_figures_the_weights_are_not_read_again(config, tmp_path, monkeypatch):
    asked = []
    source = dataclasses.replace(opened(config, tmp_path), inputs=lambda: asked.append("inputs"))
    monkeypatch.setattr("saejax.run.evaluate", lambda *a, inputs, **_: ({}, asked.append(inputs)))
    monkeypatch.setattr("saejax.run.format_table", lambda result: "")
    monkeypatch.setattr("saejax.run.write_json", lambda *_: None)
    for tokens in (0, 64):
        experiment = dataclasses.make_dataclass("E", ["evaluation"])(
            dataclasses.make_dataclass("C", ["downstream_tokens"])(tokens)
        )
        run = dataclasses.make_dataclass("R", ["evaluation"])(os.devnull)
        fitted = dataclasses.make_dataclass("F", ["sae", "untrained", "dead_fraction"])(
            None, lambda: None, 0.0
        )
        Experiment._evaluate(experiment, source, fitted, run)
    assert asked == [None, "inputs", None]
