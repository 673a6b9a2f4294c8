"""Every family of subject models against numbers of the `transformers` library.

The folders in tests/fixtures/subjects are written by make_subjects.py there: noisy random models,
explicit layer types, windows shorter than the context, padding in the second row.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from saejax.subjects import base, decoder, families, hf
from saejax.subjects.rope import Rope

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "subjects"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
TOLERANCE = 3e-5
# Do not wait for a thorough compilation: what is computed is the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
APPLY = jax.jit(decoder.apply, static_argnums=1, compiler_options=QUICK)


@functools.cache
def subject(case: str, dtype: str = "float32") -> base.Subject:
    return hf.load_subject(str(FOLDER / case), dtype=dtype, tokenizer=False)


@functools.cache
def reference(case: str) -> dict[str, np.ndarray]:
    return load_file(FOLDER / case / "reference.safetensors")


def differences(case: str, config=None) -> dict[str, float]:
    """Largest difference at the logits and every site, over real tokens."""
    s, there = subject(case), reference(case)
    cfg = s.config.decoder if config is None else config

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, tokens):
        seen = {}
        logits = decoder.apply(params, cfg, tokens, lambda site, x: seen.setdefault(site, x))
        return seen | {"logits": logits}

    seen = run(s.params, there["tokens"])
    assert set(seen) == set(there) - {"tokens", "mask"}, "every site has a reference"
    late = slice(-there["logits"].shape[1], None)
    mask = there["mask"][:, late]
    return {
        site: float(np.abs(np.asarray(x)[:, late][mask] - there[site][mask]).max())
        for site, x in seen.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_site_are_those_of_transformers(case):
    worst = differences(case)
    assert set(worst) == {*subject(case).sites(), "logits"}
    assert max(worst.values()) <= TOLERANCE, worst


def every_rope(**change):
    return lambda c: {"ropes": tuple(dataclasses.replace(rope, **change) for rope in c.ropes)}


def every_window(change):
    return lambda c: {"windows": tuple(w and change(w) for w in c.windows)}


FAULTS = [
    ("gpt2", lambda c: {"epsilon": 1e-5}),
    ("gpt2", lambda c: {"activation": "gelu"}),
    ("gpt2_untied", lambda c: {"activation": "gelu_new"}),
    ("pythia", every_rope(dims=8)),
    ("pythia", every_rope(theta=1000.0)),
    ("pythia", lambda c: {"parallel": False}),
    ("pythia", lambda c: {"epsilon": 1e-6}),
    ("neox_sequential", every_rope(factor=3.01)),
    ("llama", every_rope(theta=3100.0)),
    ("llama", lambda c: {"epsilon": 1e-6}),
    ("llama", lambda c: {"attention_scale": 7**-0.5}),
    ("llama3_long", every_rope(kind="default")),
    ("llama3_long", every_rope(original_context=512)),
    ("llama3_long", every_rope(high_freq_factor=3.9)),
    ("llama3_long", every_rope(low_freq_factor=1.1)),
    ("mistral", every_window(lambda w: w + 1)),
    ("mistral", every_window(lambda w: w - 1)),
    ("qwen2", every_window(lambda w: w + 1)),
    ("qwen2", lambda c: {"windows": c.windows[1:] + c.windows[:1]}),
    ("qwen2", lambda c: {"epsilon": 1e-5}),
    ("qwen3", lambda c: {"qk_norm": False}),
    ("qwen3", every_rope(theta=1.1e6)),
    ("gemma2", lambda c: {"attention_cap": 4.1}),
    ("gemma2", lambda c: {"logit_cap": 5.1}),
    ("gemma2", lambda c: {"activation": "gelu"}),
    ("gemma2", lambda c: {"epsilon": 1e-6}),
    ("gemma2", every_window(lambda w: w + 1)),
    ("gemma3_text", lambda c: {"ropes": c.ropes[1:] + c.ropes[:1]}),
    ("gemma3_text", every_rope(kind="default")),
    ("gemma3_text", every_window(lambda w: w - 1)),
    ("gemma3_text", lambda c: {"epsilon": 1e-6}),
]


@pytest.mark.parametrize("case, fault", FAULTS)
def test_a_fault_of_the_computation_would_be_seen(case, fault):
    config = subject(case).config.decoder
    change = fault(config)
    assert dataclasses.replace(config, **change) != config
    there = reference(case)
    wrong = APPLY(subject(case).params, dataclasses.replace(config, **change), there["tokens"])
    late = slice(-there["logits"].shape[1], None)
    moved = np.abs(np.asarray(wrong)[:, late] - there["logits"])[there["mask"][:, late]].max()
    assert moved > 3 * TOLERANCE, f"{change} moves the logits by {moved:.1e}"


def test_the_tested_families_are_all_there_are():
    assert {subject(case).family for case in CASES} == set(families.families())


def test_a_family_is_one_file(tmp_path, monkeypatch):
    source = "from saejax.subjects.families.llama import FAMILIES as LLAMA\n"
    source += "FAMILIES = {'invented': LLAMA['llama']}\n"
    (tmp_path / "invented.py").write_text(source)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert set(families.families()) > {"invented", "llama"}
    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "llama", folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "invented"}))
    loaded = hf.load_subject(str(folder), tokenizer=False)
    assert loaded.family == "invented"
    jax.tree.map(np.testing.assert_array_equal, loaded.params, subject("llama").params)


def test_long_contexts_are_computed_in_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(decoder, "_QUERY_BLOCK", 7)  # of 20, where windows are of 6 or full
    assert max(differences("gemma2").values()) <= TOLERANCE


def read(case: str, *dropped: str, **changes):
    """The configuration of a case's config.json after changes to it."""
    raw = json.loads((FOLDER / case / "config.json").read_text())
    raw = {name: value for name, value in raw.items() if name not in dropped} | changes
    return families.families()[raw["model_type"]].read_config(raw).decoder


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD = [
    ("pythia", {"rotary_emb_base": 900.0, "rotary_pct": 0.25}),
    (
        "neox_sequential",
        {
            "rotary_emb_base": 900.0,
            "rotary_pct": 0.5,
            "rope_scaling": {"type": "linear", "factor": 3.0},
        },
    ),
    ("llama", {"rope_theta": 3000.0, "rope_scaling": None}),
    (
        "llama3_long",
        {
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3
            | {"rope_type": "llama3", "original_max_position_embeddings": 64},
        },
    ),
    ("gemma2", {"rope_theta": 2000.0, "hidden_act": "gelu_pytorch_tanh"}),
    (
        "gemma3_text",
        {
            "rope_theta": 5e4,
            "rope_local_base_freq": 700.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
]


@pytest.mark.parametrize("case, older", OLD, ids=[case for case, _ in OLD])
def test_files_of_older_versions_give_the_same_configuration(case, older):
    assert read(case, "rope_parameters", **older) == subject(case).config.decoder


def test_defaults_of_the_library_stand_in_for_missing_fields():
    gone = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "hidden_act")
    llama = read("llama", *gone, hidden_size=32)
    assert (llama.n_kv_heads, llama.d_head, llama.tied, llama.activation) == (4, 8, False, "silu")
    assert read("gemma2", "tie_word_embeddings").tied
    shown = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    shown |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    raw = {"model_type": "gemma3", "text_config": shown}  # a file of the hub's first Gemma 3
    cfg = families.families()["gemma3"].read_config(raw)
    assert (cfg.vocab_size, cfg.n_heads, cfg.n_kv_heads, cfg.d_head) == (262208, 8, 4, 256)
    assert cfg.windows[:6] == (1024,) * 5 + (None,) and cfg.tied and cfg.attention_scale == 1 / 16
    assert cfg.ropes[5] == Rope(dims=256, theta=1e6, kind="linear", factor=8.0)
    assert cfg.ropes[0] == Rope(dims=256, theta=1e4)
    qwen = read("qwen2", "layer_types", max_window_layers=1)
    assert qwen.windows == (None, 5, 5)
    assert read("qwen2", "layer_types", use_sliding_window=False).windows == ()
    assert read("mistral", sliding_window=None).windows == ()
    assert read("pythia", hidden_act="gelu_fast").activation == "gelu_fast"  # of GPT-NeoX-20B


DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
REFUSED = [
    ("llama", {"rope_parameters": DEFAULT | {"rope_type": "yarn"}}, "rope_type = 'yarn' is not"),
    ("llama", {"rope_parameters": DEFAULT | {"rope_type": "linear"}}, "needs factor"),
    ("llama", {"rope_parameters": DEFAULT | {"mscale": 2.0}}, "mscale of rope_type = 'default'"),
    ("llama", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    ("llama", {"rope_parameters": {"full_attention": DEFAULT}}, "differ between layers"),
    ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported; allowed: gelu_new"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act = ['silu'] is not supported; allowed:"),
    ("llama", {"rope_parameters": ["linear"]}, "rope_parameters = ['linear'], an object"),
    ("llama", {"rope_parameters": DEFAULT | {"rope_theta": [1]}}, "rope_theta = [1] of RoPE"),
    ("llama", {"num_attention_heads": 0, "head_dim": 8}, "num_attention_heads = 0"),
    ("pythia", {"rope_parameters": "x"}, "rope_parameters = 'x', an object of fields is needed"),
    ("mistral", {"sliding_window": "4"}, "sliding_window = '4', a positive whole number"),
    ("qwen2", {"max_window_layers": "1"}, "max_window_layers = '1', a whole number is needed"),
    ("qwen2", {"layer_types": 3}, "layer_types = 3, a list is needed"),
    ("qwen2", {"layer_types": [["x"]] * 3}, "and ['x']"),
    ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "full_attention = 3, an object"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_heads = 3 must divide n_heads = 4"),
    ("llama", {"num_hidden_layers": None, "hidden_size": "8"}, "hidden_size, num_hidden_layers"),
    ("llama", {"attention_bias": "yes"}, "attention_bias = 'yes'"),
    ("mistral", {"attention_bias": True}, "attention_bias = True is not supported"),
    ("pythia", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.2}}, "3 rotated"),
    (
        "pythia",
        {"rope_parameters": None, "rotary_pct": None},
        "rotary_pct = null, a positive number is needed",
    ),
    ("pythia", {"rope_parameters": None, "rotary_emb_base": None}, "(rope_theta) is null"),
    ("pythia", {"layer_norm_eps": None}, "layer_norm_eps = null"),
    ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar = null"),
    ("pythia", {"num_attention_heads": 3}, "num_attention_heads = 3 must divide"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention'"),
    ("qwen2", {"layer_types": ["full_attention"]}, "each of the 3 layers, but has 1"),
    ("qwen2", {"use_sliding_window": False}, "sliding_window is missing"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma3_text", {"rope_parameters": DEFAULT}, "rope_theta, rope_type; it must have"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not"),
    ("gemma3", {"text_config": None}, "needs an object text_config"),
    ("gemma3", {"text_config": {"model_type": "other"}}, "text_config.model_type = 'other'"),
]


@pytest.mark.parametrize("case, change, message", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(case, **change)
