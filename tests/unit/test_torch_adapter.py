"""Models of the transformers library run by PyTorch: a decoder, an encoder, a vision tower."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from saejax.data.token_arrays import TokensConfig
from saejax.subjects import hf
from saejax.subjects.harvest import HarvestConfig, harvest


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"needs torch and transformers: pip install 'saejax\[torch\]'"
    with pytest.raises(ValueError, match=message):
        hf.load_subject("torch:some/model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch = pytest.importorskip("torch")
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 24, "initializer_range": 0.3}
    gpt2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    models = {
        "bert": tf.BertForMaskedLM(
            tf.BertConfig(vocab_size=61, max_position_embeddings=32, **small)
        ),
        "gpt2": tf.GPT2LMHeadModel(
            tf.GPT2Config(**gpt2, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
        ),
        "vit": tf.ViTModel(tf.ViTConfig(image_size=12, patch_size=4, **small)),
        "t5": tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        ),
    }
    found = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.eval().save_pretrained(folder)
        found[name] = (model, folder)
    return found


def load(folder, **options):
    return hf.load_subject(f"torch:{folder}", tokenizer=False, **options)


def ids(rows=3, length=9):
    return np.random.default_rng(0).integers(0, 61, (rows, length)).astype(np.int32)


def test_a_decoder_gives_what_our_own_gives(folders):
    _, folder = folders["gpt2"]
    s, ours = load(folder), hf.load_subject(str(folder), tokenizer=False)
    same = {
        "h.0:input": "0.resid_pre",
        "h.1": "1.resid_post",
        "h.0.attn.c_proj:input": "0.attn_z",
        "h.1.mlp.c_proj:input": "1.mlp_hidden",
        "h.1.mlp": "1.mlp_out",
        "ln_f": "final",
    }
    assert (s.family, s.takes, s.max_context) == ("gpt2", "tokens", 32)
    assert (s.d_model, s.n_layers) == (ours.d_model, ours.n_layers)
    theirs = s.capture_host(ids(), list(same), np.array([9, 9, 4]))
    expected = ours.capture_host(ids(), list(same.values()))
    for site, name in same.items():
        assert s.width(site) == ours.width(name)
        for row, length in enumerate((9, 9, 4)):
            np.testing.assert_allclose(
                theirs[site][row, :length], expected[name][row, :length], atol=3e-5
            )


def test_an_encoder_attends_to_real_tokens_only(folders):
    s, tokens = load(folders["bert"][1]), ids()
    site, length = "encoder.layer.1", np.array([9, 5, 1])
    got = s.capture_host(tokens, [site, "encoder.layer.0.attention"], length)
    assert got[site].shape == (3, 9, 16) and got[site].dtype == np.float32
    for row, n in enumerate(length):
        alone = s.capture_host(tokens[row : row + 1, :n], [site])[site]
        np.testing.assert_allclose(got[site][row, :n], alone[0], atol=1e-5)
    everything = s.capture_host(tokens, [site])[site]
    assert np.abs(everything[1, :5] - got[site][1, :5]).max() > 1e-3, "the mask matters"
    assert not [site for site in s.sites() if "pooler" in site], "it is not in the file"


def test_a_vision_tower_takes_pixels(folders):
    import torch

    model, folder = folders["vit"]
    s = load(folder)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype("f4")
    site = s.sites()[-1]
    assert s.takes == "pixels" and s.max_context == 10 and s.width(site) == 16
    sites = [site for site in s.sites() if s.shapes[site] == (10, 16)]
    got = s.capture_host(pixels, sites)
    with torch.no_grad():
        states = model(torch.tensor(pixels), output_hidden_states=True).hidden_states
    matched = [
        any(np.abs(value - state.numpy()).max() < 1e-5 for value in got.values())
        for state in states
    ]
    assert all(matched) and len(states) == 3


def test_of_an_encoder_decoder_the_encoder_is_taken(folders):
    s = load(folders["t5"][1])
    assert s.capture_host(ids(), ["block.1"])["block.1"].shape == (3, 9, 16)
    assert not [site for site in s.sites() if "decoder" in site]


def test_what_runs_more_than_once_is_no_site_and_wrong_sites_are_named(folders):
    s = load(folders["bert"][1])
    with pytest.raises(ValueError, match=r"'encoder.layer.7' does not exist .* encoder\.layer\.1"):
        s.check_site("encoder.layer.7")
    with pytest.raises(ValueError, match="sites is empty"):
        s.capture_host(ids(), [])
    with pytest.raises(ValueError, match="token id 61 is outside the vocabulary"):
        s.capture_host(np.array([[61]]), ["encoder.layer.1"])
    with pytest.raises(ValueError, match="runs in PyTorch, outside JAX"):
        s.apply(None, ids())


def test_a_harvest_of_text_by_a_model_in_its_own_precision(folders, tmp_path):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 61, (40, 9)))
    cfg = HarvestConfig(
        subject=f"torch:{folders['gpt2'][1]}",
        site="h.1",
        context_length=9,
        contexts_per_shard=8,
        dtype="bfloat16",
        text=TokensConfig(source=str(tmp_path / "ids.npy"), held_out_percent=20.0),
    )
    train, _ = harvest(cfg, tmp_path / "s", str)["h.1"]
    s = load(folders["gpt2"][1], dtype="bfloat16")
    assert s.dtype == "bfloat16" and train.spec.subject_fingerprint == s.fingerprint
    with pytest.raises(ValueError, match="loaded in bfloat16 and computes in it"):
        harvest(dataclasses.replace(cfg, dtype="float32"), tmp_path / "t", str, subject=s)
    with pytest.raises(ValueError, match="subject_shards = 2"):
        harvest(dataclasses.replace(cfg, subject_shards=2), tmp_path / "t", str)
    pictures = dataclasses.replace(cfg, subject=f"torch:{folders['vit'][1]}", site="layernorm")
    with pytest.raises(ValueError, match=r"takes pixels, and Harvest.text = @Tokens\(\): give it"):
        harvest(pictures, tmp_path / "t", str)
    assert not (tmp_path / "t").exists()


def test_what_a_later_module_writes_in_place_is_not_seen(folders):
    s = load(folders["gpt2"][1])
    handle = s.model.h[1].register_forward_pre_hook(lambda _, args: (args[0].add_(1.0), *args[1:]))
    alone = s.capture_host(ids(), ["h.0"])["h.0"]
    both = s.capture_host(ids(), ["h.0", "h.1"])["h.0"]
    handle.remove()
    np.testing.assert_array_equal(alone, both)


@pytest.mark.parametrize(
    "kind, more, longest",
    [
        ("Camembert", {}, 32),
        ("MPNet", {}, 32),  # always as if padding had id 1
        ("IBert", {}, 32),  # has an embedding of its own
        ("Roberta", {"pad_token_id": 0}, 33),
        ("Roberta", {"pad_token_id": -1}, 34),
        ("Electra", {"embedding_size": 16}, 34),
    ],
)
def test_positions_that_begin_behind_padding_shorten_the_context(tmp_path, kind, more, longest):
    pytest.importorskip("torch")
    tf = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 24, "max_position_embeddings": 34, "vocab_size": 61}
    model = getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(**small, **more))
    model.save_pretrained(tmp_path / "model")
    s, tokens = load(tmp_path / "model"), 2 + ids(2, longest + 1) % 59
    site = s.sites()[-1]
    assert s.max_context == longest
    assert s.capture_host(tokens[:, :-1], [site])[site].shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        s.capture_host(tokens, [site])
    np.save(tmp_path / "ids.npy", tokens)
    cfg = HarvestConfig(
        subject=f"torch:{tmp_path / 'model'}",
        site=site,
        context_length=longest + 1,
        text=TokensConfig(source=str(tmp_path / "ids.npy")),
    )
    with pytest.raises(ValueError, match=f"has {longest} positions; give at most that"):
        harvest(cfg, tmp_path / "s", str)
    assert not (tmp_path / "s").exists()


def test_the_pass_ends_after_the_last_site(folders):
    s, ran = load(folders["gpt2"][1]), []
    handle = s.model.h[1].register_forward_hook(lambda *_: ran.append(1))
    s.capture_host(ids(), ["h.0.mlp"])
    assert not ran
    s.capture_host(ids(), ["ln_f"])
    handle.remove()
    assert ran


def test_the_fingerprint_follows_weights_and_type(folders):
    folder = folders["gpt2"][1]
    prints = {load(folder).fingerprint, load(folder).fingerprint}
    assert len(prints) == 1
    assert load(folder, dtype="bfloat16").fingerprint not in prints
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        load(folder, dtype="int8")


def unsupported(tf):
    """Models that take what the adapter does not give: name, model, what is said."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 24}
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    heard = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (2, 2)}
    heard |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    whisper = {f"{end}_{k}": v for end in ("encoder", "decoder") for k, v in sizes.items()}
    whisper |= {"d_model": 16, "vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 20}
    whisper |= {f"{kind}_token_id": 0 for kind in ("bos", "eos", "pad", "decoder_start")}
    video = {"image_size": 16, "patch_size": 4, "num_frames": 4, "tubelet_size": 2}
    convnext = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "image_size": 32}
    unknown = r"pixel_values of unknown size: its config\.json has no usable image_size"
    yield tf.ResNetModel(tf.ResNetConfig(**resnet)), unknown
    yield tf.ConvNextModel(tf.ConvNextConfig(**convnext)), "and no module of it gives"
    heard = tf.Wav2Vec2Config(**small, **heard, num_conv_pos_embedding_groups=2)
    yield tf.Wav2Vec2Model(heard), "takes input_values; "
    yield tf.WhisperModel(tf.WhisperConfig(**whisper)), "takes input_features; "
    alone = r"cannot be run on them alone; a pass of pixel_values \(3, 16, 16\) ends in ValueError"
    yield tf.VideoMAEModel(tf.VideoMAEConfig(**small, **video)), alone


def test_models_that_take_something_else_are_refused_in_one_line(tmp_path):
    pytest.importorskip("torch")
    for model, told in unsupported(pytest.importorskip("transformers")):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match=f"subject 'torch:.*{told}.*adapter runs models that"):
            load(folder)


def test_code_and_pickles_are_refused(folders, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "odd", "auto_map": {"AutoModel": "odd.Odd", "AutoConfig": "odd.C"}}
        )
    )
    (tmp_path / "odd.py").write_text("raise SystemExit('was run')")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled weights are never read"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(
        (folders["vit"][1] / "model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="without running code of its repository"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": ["gpt2"]}, r"config\.json: model_type = \['gpt2'\], a text is needed"),
        ({"activation_function": ["gelu"]}, r"config\.json .* wrong: .*'activation_function'"),
        ({"n_head": 0}, r"config\.json .* wrong: ZeroDivisionError: "),
    ],
)
def test_wrong_types_in_the_config_are_refused_in_one_line(folders, tmp_path, change, message):
    folder = folders["gpt2"][1]
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_file_that_may_not_be_read_is_told_as_such(folders, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(hf.weights, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match=r"model\.safetensors cannot be read \(Permission"):
        load(folders["gpt2"][1])


def test_weights_that_are_missing_are_named(folders, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = folders["gpt2"][1]
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.1.mlp.c_fc.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no weights for h\.1\.mlp\.c_fc\.weight"):
        load(tmp_path)
