"""Loading subjects: the embedded one, local folders, shards, and everything that can be wrong."""

import importlib.util
import json
import math
import pathlib
import re
import sys
import types

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from saejax.data import corpus
from saejax.data import tokens as packing
from saejax.subjects import base, gpt2, hf

EMBEDDED = pathlib.Path(hf.__file__).parent / "embedded"


def tensors(cfg):
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype("f4") for k, s in gpt2.tensor_shapes(cfg).items()}


@pytest.fixture
def folder(tmp_path):
    """A tiny GPT-2 on disk, with the embedded subject's tokenizer."""
    cfg = gpt2.GPT2Config(
        vocab_size=4100, n_positions=16, d_model=8, n_layers=2, n_heads=2, d_mlp=16
    )
    save_file(tensors(cfg), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf()))
    (tmp_path / "tokenizer.json").write_bytes((EMBEDDED / "tokenizer.json").read_bytes())
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_embedded_subject_predicts_python_it_has_not_seen():
    subject = hf.load_subject("embedded")
    assert (subject.d_model, subject.n_layers, subject.max_context) == (192, 4, 128)
    assert sum(f.stat().st_size for f in EMBEDDED.glob("*.safetensors")) < 6e6
    documents = corpus.read_documents(corpus.TextConfig(max_bytes=120_000), "held_out")
    packed = packing.pack(documents, subject.tokenizer, 128)
    x_BT = packed.tokens[:: max(1, len(packed.tokens) // 48)].astype(np.int32)

    def nats(params):
        logits = subject.apply(params, x_BT[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, x_BT[:, 1:]).mean()

    per_byte = packed.tokens.size / packed.bytes_total
    bits = float(jax.jit(nats)(subject.params)) * per_byte / math.log(2)
    assert 0.8 < bits < 1.5, "a 5-gram model has about 1.5"


def test_sharded_files_give_the_same_subject(folder):
    whole = hf.load_subject(str(folder))
    raw = load_file(folder / "model.safetensors")
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, value) in enumerate(raw.items()):
        shards[sorted(shards)[i % 2]][name] = value
    (folder / "model.safetensors").unlink()
    for file, content in shards.items():
        save_file(content, folder / file)
    places = {name: file for file, content in shards.items() for name in content}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert hf.load_subject(str(folder)).fingerprint == whole.fingerprint
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        hf.load_subject(str(folder))


def test_other_families_are_refused_with_the_supported_ones(folder):
    for kind in ("mamba", ["gpt2"], None):
        edit(folder / "config.json", model_type=kind)
        told = rf"model_type = {re.escape(repr(kind))} in .*config\.json .* supported families: "
        with pytest.raises(ValueError, match=told + "gemma2, .*, gpt2, .* 'torch:"):
            hf.load_subject(str(folder))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(folder):
    cfg = gpt2.GPT2Config(vocab_size=9, n_positions=8, d_model=8, n_layers=1, n_heads=2, d_mlp=16)
    save_file(tensors(cfg), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(cfg.to_hf()))
    with pytest.raises(ValueError, match="tokenizer has 4096 ids, the model's vocab_size is 9"):
        hf.load_subject(str(folder))


@pytest.mark.parametrize(
    ("bos", "eos", "refused"),
    [
        (0, 0, False),
        (1, 2, True),
        (4099, [4097, 4098], True),
        (1, [2, 0], False),  # of several ids one is the tokenizer's
        (1, 0, False),  # a beginning of its own
        (0, 5, False),  # ends turns, not texts
        (None, 5, False),
        (50256, 50256, False),  # GPT-2's defaults in a smaller model
        (7, 50256, False),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(folder, bos, eos, refused):
    edit(folder / "config.json", bos_token_id=bos, eos_token_id=eos)
    (folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": null}')
    both = f"bos_token_id = {bos} and eos_token_id = {eos}, but the tokenizer begins texts with 0"
    for load in (hf.load_subject, hf.describe_subject):
        if refused:
            with pytest.raises(ValueError, match=re.escape(both)):
                load(str(folder))
        else:
            assert load(str(folder)).tokenizer.eot_id == 0
    if refused:
        assert hf.load_subject(str(folder), tokenizer=False).tokenizer is None


def test_the_ids_of_a_nested_config():
    raw = {"eos_token_id": [1, 106], "text_config": {"bos_token_id": 2, "eos_token_id": 9}}
    assert [base.special_ids(raw, kind) for kind in ("bos", "eos", "pad")] == [(2,), (1, 106), ()]


def test_special_ids_of_a_folder_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    edit(folder / "config.json", bos_token_id=5, eos_token_id=[7, 9], pad_token_id=11)
    found = hf.load_subject(str(folder), ids_only=True).tokenizer
    assert (found.bos_id, found.eot_id, found.special_ids) == (5, 7, {5, 7, 9, 11})
    edit(folder / "config.json", bos_token_id=None, eos_token_id=50256, pad_token_id=None)
    found = hf.load_subject(str(folder), ids_only=True).tokenizer
    assert (found.bos_id, found.special_ids) == (None, frozenset())


def test_a_subject_is_described_without_its_weights(folder, monkeypatch):
    whole = hf.load_subject(str(folder))
    monkeypatch.setattr(hf.weights, "load_params", None)
    told = hf.describe_subject(str(folder))
    assert told.params == {} and told.fingerprint == ""
    assert (told.name, told.family, told.config) == (whole.name, whole.family, whole.config)
    assert told.tokenizer.fingerprint == whole.tokenizer.fingerprint
    (folder / "tokenizer.json").unlink()
    assert hf.describe_subject(str(folder), ids_only=True).tokenizer.vocab_size == 4100
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        hf.describe_subject(str(folder))
    edit(folder / "config.json", n_layer=3)
    with pytest.raises(ValueError, match=r"missing h\.2\.attn\.c_attn\.weight"):
        hf.describe_subject(str(folder))


def test_weights_of_another_shape_are_refused(folder):
    edit(folder / "config.json", n_layer=3)
    with pytest.raises(ValueError, match=r"missing h\.2\.attn\.c_attn\.weight"):
        hf.load_subject(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_damaged_files_are_named(folder, name):
    (folder / name).write_bytes(b"\x00\x01 nonsense")
    with pytest.raises(ValueError, match=name):
        hf.load_subject(str(folder))
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=str(name if name != "tokenizer.json" else folder)):
        hf.load_subject(str(folder))


@pytest.mark.parametrize("name", ["./no/such/folder", "/nowhere", "~/nowhere", "embeded", "a/b/c"])
def test_what_is_no_folder_and_no_id_is_refused(name):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        hf.load_subject(name)


def test_a_hub_id_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        hf.load_subject("openai-community/gpt2")


class _Errors(types.ModuleType):
    class RepositoryNotFoundError(OSError):
        pass

    class GatedRepoError(RepositoryNotFoundError):
        pass

    class RevisionNotFoundError(OSError):
        pass

    class LocalEntryNotFoundError(FileNotFoundError):
        pass


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("GatedRepoError", PermissionError, "is gated"),
        ("RepositoryNotFoundError", FileNotFoundError, "no such model"),
        ("RevisionNotFoundError", FileNotFoundError, "no revision 'v9'"),
        ("LocalEntryNotFoundError", FileNotFoundError, "check the network"),
    ],
)
def test_answers_of_the_hub_become_one_clear_line(monkeypatch, folder, name, error, message):
    """The hub cannot be reached in a test: its package is replaced by its documented errors."""
    hub, errors = types.ModuleType("huggingface_hub"), _Errors("huggingface_hub.errors")
    hub.errors = errors
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def fail(repository, allow_patterns, revision):
        raise getattr(errors, name)(f"{repository} {revision}")

    hub.snapshot_download = fail
    with pytest.raises(error, match=message):
        hf.load_subject("owner/model@v9")
    commit = folder / "snapshots" / "0123abc"
    commit.mkdir(parents=True)
    for file in folder.glob("*.*"):
        file.rename(commit / file.name)
    asked = []
    hub.snapshot_download = lambda repository, allow_patterns: (
        asked.extend(allow_patterns) or str(commit)
    )
    subject = hf.load_subject("owner/model")
    assert (subject.name, subject.revision) == ("owner/model", "0123abc")
    assert {"preprocessor_config.json", "processor_config.json"} < set(asked)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_odd.Odd"}}, "auto_map asks to run code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
    ],
)
def test_code_of_a_repository_is_never_run(folder, change, message):
    edit(folder / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        hf.load_subject(str(folder))


def test_a_written_folder_is_the_same_subject(folder, tmp_path):
    s = hf.load_subject(str(folder))
    for dtype, same in (("float32", True), ("bfloat16", False)):
        hf.write_folder(tmp_path / dtype, s.config, s.params, s.tokenizer, dtype=dtype)
        again = hf.load_subject(str(tmp_path / dtype))
        assert again.config == s.config and (again.fingerprint == s.fingerprint) == same
        assert again.tokenizer.fingerprint == s.tokenizer.fingerprint
    with pytest.raises(ValueError, match="dtype = 'float16'"):
        hf.write_folder(tmp_path / "x", s.config, s.params, dtype="float16")


def test_a_subject_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    s = hf.load_subject(str(folder), tokenizer=False)
    assert s.tokenizer is None and s.capture_host(np.array([[4099, 0]]), ["final"])
