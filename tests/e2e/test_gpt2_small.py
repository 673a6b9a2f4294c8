"""`gin/gpt2_small_32k.gin` from a folder as the hub has it: GPT-2 small at full size, random."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
from safetensors.numpy import save_file

from saejax.data.bpe import byte_symbols

ROOT = pathlib.Path(__file__).resolve().parents[2]
WIDTH, LAYERS, CONTEXT, VOCABULARY = 768, 12, 1024, 50_257
END = "<|endoftext|>"
# Everything but amounts is the file's own.
BINDINGS = {
    "Harvest.tokens": 5000,
    "Harvest.held_out_tokens": 1000,
    "Harvest.contexts_per_shard": 16,
    "Harvest.batch_contexts": 8,
    "Train.tokens": 4096,
    "Train.batch_size": 1024,
    "Train.microbatch_size": 512,
    "Train.sample_rows": 512,
    "Train.log_every": 1,
    "Optimizer.warmup_steps": 1,
    "Optimizer.learning_rate": 1e-3,
    "Evaluation.pca": False,
    "Evaluation.untrained": False,
    "Evaluation.batch_size": 512,
    "Evaluation.downstream_tokens": 256,
    "Report.latents": 4,
    "Mesh.mesh_shape": (1, 1),
}


def tensors() -> dict[str, np.ndarray]:
    """As in the published model.safetensors: no prefix, and the causal masks of old versions."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": 1 + drawn(WIDTH), f"{name}.bias": drawn(WIDTH)}

    def linear(name: str, n_in: int, n_out: int) -> dict[str, np.ndarray]:
        return {f"{name}.weight": drawn(n_in, n_out), f"{name}.bias": drawn(n_out)}

    found = {"wte.weight": drawn(VOCABULARY, WIDTH), "wpe.weight": drawn(CONTEXT, WIDTH)}
    for layer in range(LAYERS):
        block = f"h.{layer}"
        found |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
        found |= linear(f"{block}.attn.c_attn", WIDTH, 3 * WIDTH)
        found |= linear(f"{block}.attn.c_proj", WIDTH, WIDTH)
        found |= linear(f"{block}.mlp.c_fc", WIDTH, 4 * WIDTH)
        found |= linear(f"{block}.mlp.c_proj", 4 * WIDTH, WIDTH)
        found[f"{block}.attn.bias"] = np.tril(np.ones((1, 1, CONTEXT, CONTEXT), np.float32))
    return found | norm("ln_f")


def tokenizer() -> dict:
    """A byte-level BPE of GPT-2's size: its 50,000 merges are pairs of bytes."""
    symbols = byte_symbols()
    pairs = [(one, other) for one in symbols for other in symbols][: VOCABULARY - 257]
    words = [*symbols, *(one + other for one, other in pairs)]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": VOCABULARY - 1, "content": END, "special": True, "single_word": False,
             "lstrip": False, "rstrip": False, "normalized": True},
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": {word: i for i, word in enumerate([*words, END])},
            "merges": [f"{one} {other}" for one, other in pairs],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Iterator[pathlib.Path]:
    """What `transformers` writes for GPT-2 small, as far as anybody reads it."""
    with tempfile.TemporaryDirectory() as name:  # half a gigabyte: nothing to be left behind
        yield written(pathlib.Path(name))


@pytest.fixture
def workdir() -> Iterator[pathlib.Path]:
    """Of a run whose state has almost a gigabyte."""
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name) / "run"


def written(path: pathlib.Path) -> pathlib.Path:
    save_file(tensors(), path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": VOCABULARY - 1,
        "embd_pdrop": 0.1,
        "eos_token_id": VOCABULARY - 1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": CONTEXT,
        "n_embd": WIDTH,
        "n_head": 12,
        "n_layer": LAYERS,
        "n_positions": CONTEXT,
        "resid_pdrop": 0.1,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": VOCABULARY,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": CONTEXT}))
    return path


def test_the_run_file_runs_to_its_report(folder, workdir, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for name in ("argparse", "ast", "dis", "enum", "json/decoder", "random", "shlex", "string"):
        source = pathlib.Path(os.__file__).parent / f"{name}.py"
        (text / f"{source.stem}.txt").write_bytes(source.read_bytes())
    bindings = {"Harvest.subject": str(folder), "Text.source": str(text), **BINDINGS}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "saejax.main", "--gin_file=gin/gpt2_small_32k.gin"),
            f"--workdir={workdir}",
            *(f"--gin_bindings={name} = {value!r}" for name, value in bindings.items()),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},  # compiled as for users
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["l0"] == 32 and records[-1]["nmse"] < records[0]["nmse"]
    figures = json.loads((workdir / "evaluation.json").read_text())
    assert np.isfinite(figures["nmse"])
    # A model that knows nothing: the entropy of its vocabulary, with a site that matters little.
    assert abs(figures["ce_clean"] - np.log(VOCABULARY)) < 1
    assert (workdir / "report.html").exists()
