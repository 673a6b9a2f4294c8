"""From a data configuration to what training and evaluation read; what does not fit is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from saejax.data.bpe import END_OF_TEXT, Tokenizer, byte_symbols
from saejax.data.loader import LoaderConfig
from saejax.data.shards import StoreSpec, open_store
from saejax.data.synthetic import SyntheticConfig
from saejax.mesh import MeshShape, make_mesh
from saejax.model.sae import SAEConfig
from saejax.sources import StoredConfig, contexts_of, open_source
from saejax.subjects import gpt2
from saejax.subjects.base import make_subject

WIDTH, LENGTH, CONTEXTS, SHARDS = 16, 6, 8, 3
SAE = SAEConfig(d_model=WIDTH, n_latents=32, k=2)
MESH = make_mesh(MeshShape())


@pytest.fixture(scope="module")
def subject():
    config = gpt2.GPT2Config(
        vocab_size=257, n_positions=LENGTH, d_model=WIDTH, n_layers=1, n_heads=2, d_mlp=16
    )
    tokenizer = Tokenizer({s: i for i, s in enumerate(byte_symbols())}, [], {END_OF_TEXT: 256})
    return make_subject("tiny", config, gpt2.init(jax.random.key(0), config), tokenizer)


@pytest.fixture
def folder(tmp_path, subject):
    """Two stores; row (shard, slot, position) starts with these three numbers."""
    for split, shards in (("train", SHARDS), ("held_out", 2)):
        write(tmp_path, split, shards, subject_fingerprint=subject.fingerprint)
    return tmp_path


def write(folder, split, shards, **changes):
    spec = {
        "subject": "tiny", "subject_fingerprint": "?", "text_fingerprint": split, "split": split,
        "site": "0.resid_post", "d_model": WIDTH, "context_length": LENGTH,
        "contexts_per_shard": CONTEXTS, "n_shards": shards,
    } | changes  # fmt: skip
    store = open_store(folder / split, StoreSpec(**spec), "w")
    for shard in range(shards):
        rows = np.zeros((CONTEXTS, LENGTH - 1, WIDTH), np.float32)
        rows[..., 0], rows[..., 1] = shard, np.arange(CONTEXTS)[:, None]
        rows[..., 2] = np.arange(1, LENGTH)
        ids = shard * CONTEXTS + np.arange(CONTEXTS)
        tokens = np.tile(ids[:, None], (1, LENGTH)).astype(np.uint32)
        store.write_shard(shard, rows, tokens=tokens, context=ids, document=ids * 0, offset=ids)
    store.write_documents(["only.py"])
    store.finish()


def stored(folder, sae=SAE, batch_size=16, subject=None):
    config = StoredConfig(path=f"{folder}/", subject=subject)
    return open_source(config, sae, LoaderConfig(), batch_size, folder / "unused", MESH)


def test_a_store_serves_every_stage(folder):
    source = stored(folder)
    batch = next(source.batches.iterate(0)).astype(np.float32)
    assert batch.shape == (16, WIDTH) and source.batches.d_model == WIDTH
    assert sum(len(rows) for rows in source.train_rows()) == SHARDS * CONTEXTS * (LENGTH - 1)
    held_out = np.concatenate(list(source.held_out())).astype(np.float32)
    assert held_out.shape == (2 * CONTEXTS, LENGTH - 1, WIDTH)
    # in context order, whatever the order in the shard
    np.testing.assert_array_equal(held_out[:, :, 0], np.repeat([0, 1], CONTEXTS)[:, None] + [0] * 5)
    np.testing.assert_array_equal(held_out[0, :, 2], np.arange(1, LENGTH))
    assert source.site == "0.resid_post" and source.documents == ("only.py",)
    assert source.inputs is None and source.synthetic is None
    first, again = (list(source.held_out()) for _ in range(2))
    np.testing.assert_array_equal(first[1], again[1])  # each call starts a new pass
    assert not (folder / "unused").exists()


def test_contexts_carry_their_tokens(folder):
    blocks = list(contexts_of(open_store(folder / "held_out")))
    assert [block.rows.shape for block in blocks] == [(CONTEXTS, LENGTH - 1, WIDTH)] * 2
    for shard, block in enumerate(blocks):
        ids = shard * CONTEXTS + np.arange(CONTEXTS)
        np.testing.assert_array_equal(block.ids, ids)
        np.testing.assert_array_equal(block.tokens, np.tile(ids[:, None], (1, LENGTH)))
        np.testing.assert_array_equal(block.offset, ids)
        np.testing.assert_array_equal(block.rows[:, 0, 1].astype(int), np.arange(CONTEXTS))


def test_identity_follows_the_content(folder, tmp_path_factory, subject):
    before = stored(folder).identity
    assert set(before) == {"train", "held_out"} and before == stored(folder).identity
    other = tmp_path_factory.mktemp("other")
    write(other, "train", SHARDS, subject_fingerprint=subject.fingerprint, seed=1)
    write(other, "held_out", 2, subject_fingerprint=subject.fingerprint)
    after = stored(other).identity
    assert after["held_out"] == before["held_out"] and after["train"] != before["train"]


def test_the_subject_must_be_the_one_that_was_harvested(folder, subject, monkeypatch):
    monkeypatch.setattr("saejax.sources.load_subject", lambda name, **_: subject)
    source = stored(folder, subject="tiny")
    inputs = source.inputs()
    assert inputs.first_position == 1 and inputs.mean.shape == (WIDTH,)
    tokens, mask = next(iter(inputs.contexts))
    assert tokens.shape == mask.shape == (CONTEXTS, LENGTH)
    assert not mask[:, 0].any() and mask[:, 1:].all()
    retrained = dataclasses.replace(subject, fingerprint="0123456789abcdef")
    monkeypatch.setattr("saejax.sources.load_subject", lambda name, **_: retrained)
    with pytest.raises(
        ValueError, match=r"subject 'tiny' of fingerprint \w+, but .*0123456789abcdef"
    ):
        stored(folder, subject="tiny")


class HostSubject:
    """A subject that runs outside JAX: no parameters, no logits."""

    def __init__(self, subject):
        for name in ("name", "fingerprint", "tokenizer", "vocab_size", "resolve_site"):
            setattr(self, name, getattr(subject, name))


def test_a_subject_on_the_host_has_no_downstream_loss(folder, subject, monkeypatch, caplog):
    monkeypatch.setattr("saejax.sources.load_subject", lambda name, **_: HostSubject(subject))
    with caplog.at_level("INFO"):
        source = stored(folder, subject="torch:tiny")
    assert source.inputs is None and source.subject().name == "tiny"
    assert "subject tiny runs outside JAX: the evaluation leaves out" in caplog.text


def test_a_subject_is_loaded_as_it_was_for_the_store(tmp_path, subject, monkeypatch):
    changes = {"subject_fingerprint": subject.fingerprint, "compute_dtype": "bfloat16"}
    write(tmp_path, "train", 1, site="blocks.0.hook_resid_post", **changes)
    write(tmp_path, "held_out", 1, site="blocks.0.hook_resid_post", **changes)
    asked = []

    def load(name, **options):
        asked.append(options)
        return subject

    monkeypatch.setattr("saejax.sources.load_subject", load)
    for name in ("tiny", "torch:tiny"):
        source = stored(tmp_path, subject=name)
        assert source.site == source.inputs().site == "0.resid_post"  # by its canonical name
    assert [options["dtype"] for options in asked] == ["float32", "bfloat16"]
    assert all(options["ids_only"] for options in asked)


def test_another_width_is_refused(folder):
    wide = dataclasses.replace(SAE, d_model=24)
    message = rf"SAE\.d_model = 24 does not fit the store at {folder}/train, which is 16 wide"
    with pytest.raises(ValueError, match=message):
        stored(folder, sae=wide)
    with pytest.raises(ValueError, match=r"SAE\.d_model = 24 .* Synthetic\.d_model.* = 16"):
        open_source(SyntheticConfig(d_model=16), wide, LoaderConfig(), 16, folder, MESH)


@pytest.mark.parametrize(("field", "value"), [("site", "0.mlp_out"), ("subject_fingerprint", "x")])
def test_both_splits_must_be_of_one_harvest(tmp_path, field, value):
    write(tmp_path, "train", 1)
    write(tmp_path, "held_out", 1, **{field: value})
    with pytest.raises(ValueError, match=rf"{field} = .* but {value!r} in .*one harvest"):
        stored(tmp_path)


def test_a_batch_that_chunks_cannot_give(folder):
    with pytest.raises(
        ValueError, match=r"batch_size = 12: .* multiple of 8, or one of \[1, 2, 4\]"
    ):
        stored(folder, batch_size=12)


def test_synthetic_data_has_its_truth(tmp_path):
    config = SyntheticConfig(features=24, d_model=WIDTH, held_out_rows=10_000)
    source = open_source(config, SAE, LoaderConfig(), 16, tmp_path, MESH)
    blocks = list(source.held_out())
    assert [len(block) for block in blocks] == [8192, 10_000 - 8192]
    np.testing.assert_array_equal(np.concatenate(blocks), source.synthetic.held_out()[0])
    assert next(iter(source.train_rows())).shape == (16, WIDTH)
    assert source.contexts is None and source.subject is None
    other = open_source(
        dataclasses.replace(config, seed=1), SAE, LoaderConfig(), 16, tmp_path, MESH
    )
    assert source.identity != other.identity
    assert list(tmp_path.iterdir()) == []
