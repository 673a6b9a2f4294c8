"""The model card of the embedded subject: measured values in, README.md out."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from saejax.data.bpe import Tokenizer
from saejax.data.corpus import Document
from saejax.subjects import gpt2, ngram
from saejax.subjects.gpt2 import GPT2Config
from saejax.subjects.material import LONG_LINE, MAX_SHARED, Material

_COPIED = ("bytes_per_token", "python", "cpu_cores", "tokenizer_material")
_ORDERS = {1: "unigram", 2: "bigram", 5: "5-gram Kneser-Ney"}


_TEMPLATE = """\
# The embedded subject

A small language model of Python source code that ships inside the package, so that the first
command needs no network. GPT-2 architecture: {n_layers} layers, width {d_model}, {n_heads} heads,
{n_positions} positions, a byte-level BPE of {vocab_size:,} tokens, {millions:.2f}M parameters in
bfloat16 ({megabytes:.2f} MB). `config.json`, `model.safetensors` and `tokenizer.json` are in the
layout of the Hugging Face `transformers` library, which loads them as they are.

This file was written by `saejax/subjects/model_card.py` from what `pretrain.py` measured.

## How well it predicts

Standard library modules that nothing was trained on ({held_out_size}; all whole
windows of {n_positions} tokens, {bytes_per_token:.2f} bytes a token), the shipped bfloat16 weights
computed in float32:

| model | trained on | nats/token | bits/byte |
| --- | --- | --- | --- |
{table}

The n-gram models look back across window borders, which the language model cannot.

## What it was trained on

| part | size | seen in training |
| --- | --- | --- |
| standard library of Python {python}, without tests, `encodings`, `lib2to3` | {library_size} | \
{library_seen:.2f}M tokens, {epochs:.1f} epochs |
| its tests, `encodings` and `lib2to3`, and the packages below | {other_size} | \
{other_seen:.2f}M tokens, {other_epochs:.2f} epochs |

The tokenizer was trained on {tokenizer_material}.
Held out is every standard library module whose relative path has a sha256 in the lowest 5 % (first
8 bytes, big endian). Left out of the training material is every file whose path is or ends in the
path of a held-out file, every exact duplicate, and every file that shares more than
{max_shared:.0%} of its distinct lines of {long_line} characters or more with one held-out file, or
holds more than {max_shared:.0%} of that file's.
Numbers of files left out: {left_out}.

Held-out files: {held_out_files}.

### Licences of the material

Python's standard library: Python Software Foundation Licence. Packages, as their metadata state:

| package | version | licence |
| --- | --- | --- |
{packages}

## How it was made

Muon on kernels (learning rate {lr:g}, weight decay {weight_decay:g}), Adam on embeddings, biases
and norms (learning rate {adam_lr:g}); batches of {batch} contexts of {n_positions} tokens that
never cross a file; the standard library's share of a batch rose from {mix_start:.0%} to
{mix_end:.0%}; linear warm-up, flat, and a linear fall to zero over the last {decay:.0%} of the
time. {tokens_seen:.2f}M tokens in {steps:,} steps and {wall_minutes:.1f} minutes of wall time on
{cpu_cores} CPU cores that other programs used at the same time. Python {python}, {versions}.

To make one like it (from the Python and packages of the machine at hand, so not the same bytes):

    python -m saejax.subjects.pretrain --out=FOLDER {command}

## Limits

* It knows Python's look, not its meaning: samples are recognisable code without sense.
* It has read this very standard library for {epochs:.1f} epochs and partly knows it by heart; the
  held-out files are the fair test. Other Python versions' libraries share most lines with it.
* {n_positions} positions; text other than Python source is far from what it knows.
* It is made for learning and for testing tools. Findings on it say little about large models.
"""


def describe(
    config: GPT2Config,
    data: Material,
    tokenizer: Tokenizer,
    library: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    held: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Facts about the material and the machine, and the n-gram baselines; JSON-able.

    Args:
      config: shape of the model.
      data: documents.
      tokenizer: the model's tokenizer.
      library, other, held: token ids of the three groups of documents.
    """
    shapes = jax.eval_shape(lambda: gpt2.init(jax.random.key(0), config))
    groups = {"library": (data.library, library), "other": (data.other, other)}
    groups["held_out"] = (data.held_out, held)
    packages = ("jax", "jaxlib", "numpy", "optax")
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)),
        "groups": {name: _size(documents, ids) for name, (documents, ids) in groups.items()},
        "held_out_files": [document.name for document in data.held_out],
        "left_out": data.left_out,
        "packages": data.packages,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "cpu_cores": os.cpu_count(),
        "tokenizer": tokenizer.fingerprint,
        "baselines": baselines(library, other, held, config),
    }


def _size(documents: Sequence[Document], ids: Sequence[np.ndarray]) -> dict[str, int]:
    return {
        "files": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "tokens": sum(len(x) for x in ids),
    }


def baselines(
    library: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    held: Sequence[np.ndarray],
    config: GPT2Config,
) -> dict[str, dict[str, float]]:
    """Nats per held-out token of n-gram models, by material: the same targets as the model's.

    Unlike the model, which sees a window of its context length, an n-gram model may look back
    across window borders.
    """
    streams = {"library": [*library], "all": [*library, *other]}
    result: dict[str, dict[str, float]] = {}
    for name, documents in streams.items():
        stream = np.concatenate(documents)
        result[name] = {
            str(order): _held_out_nats(
                ngram.fit(stream, order, config.vocab_size), order, held, config.n_positions
            )
            for order in _ORDERS
        }
    return result


def _held_out_nats(
    model: ngram.NGram, order: int, held: Sequence[np.ndarray], length: int
) -> float:
    total, count = 0.0, 0
    for document in held:
        targets = (len(document) - 1) // length * length
        # The padding was never seen as a context, so the first tokens use lower orders.
        padded = np.concatenate([np.full(order - 1, document[0]), document])
        p = ngram.probabilities(model, padded)[1 : 1 + targets]
        total, count = total - float(np.log(p).sum()), count + targets
    return total / count


def render(record: Mapping[str, Any]) -> str:
    """The text of README.md from a record as `pretrain` writes it."""
    train, groups, options = record["train"], record["groups"], record["options"]
    rest = train["tokens_seen"] - train["tokens_seen_library"]
    left_out = (f"{count} ({reason})" for reason, count in record["left_out"].items())
    return _TEMPLATE.format(
        **{**record["config"], **options},
        **{f"{name}_size": _size_text(group) for name, group in groups.items()},
        table=_table(record),
        packages=_packages(record),
        left_out=", ".join(left_out) or "none",
        held_out_files=", ".join(f"`{name}`" for name in record["held_out_files"]),
        command=_command(options),
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        epochs=train["tokens_seen_library"] / groups["library"]["tokens"],
        library_seen=train["tokens_seen_library"] / 1e6,
        other_epochs=rest / groups["other"]["tokens"],
        other_seen=rest / 1e6,
        tokens_seen=train["tokens_seen"] / 1e6,
        steps=train["steps"],
        wall_minutes=train["wall_seconds"] / 60,
        adam_lr=options["lr"] * options["adam"],
        long_line=LONG_LINE,
        max_shared=MAX_SHARED,
        megabytes=record["model_bytes"] / 1e6,
        millions=record["parameters"] / 1e6,
        **{name: record[name] for name in _COPIED},
    )


def _command(options: Mapping[str, Any]) -> str:
    named = {k: v for k, v in options.items() if k not in ("out", "tokenizer")}
    return " \\\n        ".join(f"--{name}={value}" for name, value in named.items())


def _size_text(group: Mapping[str, int]) -> str:
    size, count = group["bytes"] / 1e6, group["tokens"] / 1e6
    return f"{group['files']:,} files, {size:.2f} MB, {count:.2f}M tokens"


def _table(record: Mapping[str, Any]) -> str:
    per_nat = record["held_out_bits_per_byte"] / record["held_out_nats_per_token"]
    names = {"library": "standard library", "all": "all material"}
    rows = [("uniform", "nothing", math.log(record["config"]["vocab_size"]))]
    rows += [
        (_ORDERS[int(order)], names[part], nats)
        for part, by_order in record["baselines"].items()
        for order, nats in by_order.items()
    ]
    rows += [("**this model**", names["all"], record["held_out_nats_per_token"])]
    return "\n".join(f"| {a} | {b} | {nats:.3f} | {nats * per_nat:.3f} |" for a, b, nats in rows)


def _packages(record: Mapping[str, Any]) -> str:
    return "\n".join(f"| {a} | {b} | {c} |" for a, b, c in record["packages"])
