"""Weights from safetensors: lazily, split over a mesh, and everything that can be wrong."""

import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saejax import mesh as meshes
from saejax.subjects import hf, layout, weights
from saejax.subjects.base import make_subject
from saejax.subjects.decoder import leaf_shapes
from saejax.subjects.families import families

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "subjects"
CASES = sorted(path.name for path in FOLDER.iterdir())


def load(folder, **options):
    return hf.load_subject(str(folder), tokenizer=False, **options)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER / "llama", tmp_path / "llama")


def rewrite(folder, change):
    """Changes the tensors of a folder of one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("case", CASES)
def test_tensors_survive_the_way_there_and_back(case):
    s = load(FOLDER / case, dtype="bfloat16")
    family = families()[s.family]
    out = layout.to_tensors(family, s.config.decoder, s.params)
    stored = weights.open_tensors(FOLDER / case)
    kept = {family.strip(name): t for name, t in stored.items() if family.strip(name) in out}
    assert set(kept) == set(out)
    for name, tensor in kept.items():
        np.testing.assert_array_equal(out[name], tensor.open())
    again = layout.from_tensors(family, s.config.decoder, out)
    jax.tree.map(np.testing.assert_array_equal, again, load(FOLDER / case).params)


def test_a_slice_of_a_parameter_is_that_slice_of_the_file():
    family, s = families()["gpt_neox"], load(FOLDER / "pythia")
    tensors = weights.open_tensors(FOLDER / "pythia")
    for path, piece in family.pieces(s.config.decoder).items():
        whole = layout.leaf_at(s.params, path)
        index = tuple(slice(size // 3, size - 1) for size in whole.shape)
        name = next(n for n in tensors if family.strip(n) == piece.tensor)
        np.testing.assert_array_equal(piece.read(tensors[name].open(), index), whole[index])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_split_subject_is_the_same_subject(dtype):
    case, tokens = FOLDER / "pythia", np.arange(24, dtype="i4").reshape(2, 12)
    mesh = meshes.make_mesh(meshes.MeshShape(2, 4))
    whole, split = load(case, dtype=dtype), load(case, dtype=dtype, mesh=mesh)
    assert split.fingerprint == whole.fingerprint == whole.place(mesh).fingerprint
    layer = split.params["layers"][0]
    held = [getattr(x, "_npy_value", None) for x in jax.tree.leaves(split.params)]
    assert not any(value is not None for value in held), "the fingerprint leaves a host copy"

    def local(x):
        return x.addressable_shards[0].data.shape

    # D = 32, of 40 hidden; 83 tokens do not divide by 4
    assert layer["q"]["kernel"].dtype == jnp.dtype(dtype)
    assert local(layer["q"]["kernel"]) == (32, 8) and local(layer["q"]["bias"]) == (8,)
    assert local(layer["o"]["kernel"]) == (8, 32) and local(layer["o"]["bias"]) == (32,)
    assert local(layer["down"]["kernel"]) == (10, 32) and local(layer["up"]["kernel"]) == (32, 10)
    assert local(split.params["embed"]) == (83, 32)
    placed = jax.tree.map(lambda x: x.sharding, whole.place(mesh).params)
    assert placed == jax.tree.map(lambda x: x.sharding, split.params)
    sites = ["1.resid_post", "0.attn_z"]
    one, many = (s.capture_host(tokens, sites) for s in (whole, split))
    for site in sites:
        np.testing.assert_allclose(one[site], many[site], atol=2e-5)


def test_the_fingerprint_depends_on_the_type_of_the_weights():
    prints = {load(FOLDER / "gpt2", dtype=dtype).fingerprint for dtype in weights.DTYPES}
    assert len(prints) == 2
    with pytest.raises(ValueError, match=r"dtype = 'float16' .* float32 or bfloat16"):
        load(FOLDER / "gpt2", dtype="float16")


def test_the_embedded_subject_keeps_its_fingerprint():
    s = hf.load_subject("embedded")
    assert s.fingerprint == "7a90292b0f33a8ef", "stores made before would no longer be recognised"


def test_loading_reads_no_more_than_a_parameter_at_a_time(monkeypatch):
    largest, read = [], layout.Piece.read

    def spy(piece, stored, index):
        value = read(piece, stored, index)
        largest.append(value.size)
        return value

    monkeypatch.setattr(layout.Piece, "read", spy)
    mesh = meshes.make_mesh(meshes.MeshShape(1, 4))
    s = load(FOLDER / "llama", mesh=mesh)
    shapes = leaf_shapes(s.config.decoder)
    assert max(largest) == np.prod(shapes["embed",]), "83 tokens do not divide: held whole"
    assert max(x for x in largest if x != max(largest)) == 28 * 40 // 4  # q of one device


def test_devices_that_hold_the_same_slice_read_it_once(monkeypatch):
    asked, read = [], layout.Piece.read

    def spy(piece, stored, index):
        asked.append((piece.tensor, str(index)))
        return read(piece, stored, index)

    monkeypatch.setattr(layout.Piece, "read", spy)
    split = load(FOLDER / "pythia", mesh=meshes.make_mesh(meshes.MeshShape(4, 2)))
    kernels = [x for x in jax.tree.leaves(split.params) if not x.is_fully_replicated]
    whole = len(jax.tree.leaves(split.params)) - len(kernels)
    assert kernels and len(asked) == 2 * len(kernels) + whole


def test_weights_are_read_again_from_the_same_file_only(folder):
    mesh = meshes.make_mesh(meshes.MeshShape(1, 2))
    s = load(folder, dtype="bfloat16", mesh=mesh)
    bare, path = s.without_weights(), folder / "model.safetensors"
    assert bare.params == {} and bare.fingerprint == s.fingerprint
    again = bare.place(mesh)
    jax.tree.map(np.testing.assert_array_equal, again.params, s.params)
    assert jax.tree.map(lambda x: x.sharding, again.params) == jax.tree.map(
        lambda x: x.sharding, s.params
    )
    made = make_subject("made", s.config, s.params, None)
    assert made.without_weights() is made, "it could not come back"
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"model\.safetensors was changed while it was in use"):
        bare.place(mesh)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        bare.place(mesh)


def test_truncated_and_damaged_files_are_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:1000], whole[:4], b"", whole + b"x", b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a sound safetensors file"):
            load(folder)


def test_tensors_that_do_not_fit_are_all_named(folder):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.bias"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((3, 4), "f4")
        tensors["model.layers.0.odd.weight"] = np.zeros(3, "f4")
        tensors["norm.weight"] = tensors["lm_head.weight"]
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].copy()

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        load(folder)
    for part in (
        "missing layers.1.mlp.up_proj.bias (36,)",
        "norm.weight has shape (83, 28), must be (28,)",
        "layers.0.self_attn.q_proj.weight has shape (3, 4), must be (40, 28)",
        "unknown model.layers.0.odd.weight",
        "embed_tokens.weight has shape (82, 28), must be (83, 28)",
    ):
        assert part in str(error.value)


def test_the_same_tensor_twice_is_refused(folder):
    rewrite(folder, lambda t: t.update({"norm.weight": t["model.norm.weight"]}))
    with pytest.raises(ValueError, match=r"norm\.weight is there twice"):
        load(folder)


@pytest.fixture
def tied(tmp_path):
    return shutil.copytree(FOLDER / "llama3_long", tmp_path / "tied")


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("kept", [True, False])
def test_a_tied_head_may_be_a_copy_of_the_embedding_or_stand_for_it(tied, kept):
    before, mesh = load(tied), meshes.make_mesh(meshes.MeshShape(1, 4))

    def change(tensors):
        tensors[EMBED][0, 0] = np.nan  # equal, too
        tensors[HEAD] = tensors[EMBED].copy() if kept else tensors.pop(EMBED)

    rewrite(tied, change)
    after = load(tied)
    assert np.isnan(after.params["embed"][0, 0]) and after.config == before.config
    before.params["embed"][0, 0] = np.nan
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, load(tied, mesh=mesh).params, before.params)


def test_a_tied_head_that_is_not_the_embedding_is_refused(tied, monkeypatch):
    monkeypatch.setattr(layout, "_ROWS", 20)

    def change(tensors):
        tensors[HEAD] = tensors[EMBED].astype("f4")
        tensors[HEAD][-1, -1] += 1

    rewrite(tied, change)
    told = r"lm_head\.weight in .*model\.safetensors differs from .* tie_word_embeddings to false"
    for mesh in (None, meshes.make_mesh(meshes.MeshShape(1, 4))):
        with pytest.raises(ValueError, match=told):
            load(tied, mesh=mesh)
    rewrite(tied, lambda t: t.update({HEAD: t[HEAD][:-1].copy()}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(82, .*must be \(83, "):
        hf.describe_subject(str(tied), ids_only=True)
    rewrite(tied, lambda t: t.pop(EMBED))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(82, .*must be \(83, "):
        load(tied)


def test_an_unreadable_file_is_not_called_damaged(folder, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(weights, "open", refuse, raising=False)
    told = re.escape(f"{folder / 'model.safetensors'} cannot be read (Permission denied): give")
    with pytest.raises(PermissionError, match=told):
        load(folder)


@pytest.mark.parametrize("dtype, kind", [(np.int8, "I8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_quantised_weights_are_refused(folder, dtype, kind):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: t[name].astype(dtype)}))
    with pytest.raises(ValueError, match=re.escape(f"not supported: {name} is {kind}; allowed")):
        load(folder)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_other_float_types_are_converted(folder, dtype):
    before = load(folder).params
    rewrite(folder, lambda t: t.update({n: x.astype(dtype) for n, x in t.items()}))
    after = load(folder).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, before)


def test_an_index_that_lies_is_refused(tmp_path):
    folder = shutil.copytree(FOLDER / "qwen3", tmp_path / "qwen3")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    name, file = next(iter(places.items()))
    other = next(f for f in places.values() if f != file)
    path.write_text(json.dumps({"weight_map": places | {name: other}}))
    with pytest.raises(ValueError, match=re.escape(f"{other} has no tensor {name}")):
        load(folder)
    path.write_text(json.dumps({"weight_map": places | {name: "../x.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"names the shard '\.\./x\.safetensors'"):
        load(folder)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must have an object weight_map"):
        load(folder)


def test_weights_held_in_bfloat16_can_compute_in_both_types():
    tokens = np.arange(16, dtype="i4")[None]
    exact = load(FOLDER / "gemma2").capture_host(tokens, ["final"])["final"]
    s = load(FOLDER / "gemma2", dtype="bfloat16")
    rough = s.capture_host(tokens, ["final"], dtype=jnp.bfloat16)["final"]
    assert rough.dtype == ml_dtypes.bfloat16
    assert 1e-3 < np.abs(rough.astype("f4") - exact).max() < 0.3
    # the file holds bfloat16, so nothing but the order of sums can differ
    np.testing.assert_allclose(s.capture_host(tokens, ["final"])["final"], exact, atol=1e-5)
