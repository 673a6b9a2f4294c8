"""Trains the language model that ships with the package, on whatever machine this runs on.

    python -m saejax.subjects.pretrain --out=FOLDER --minutes=70

writes FOLDER/{config.json, model.safetensors, tokenizer.json, README.md, pretrain.json}. The
material is the standard library of the running Python, its tests, and the source of the installed
dependencies (`material.py`), so another Python gives another model; README.md (the model card)
records versions, files, licences, tokens and time. The schedule is a share of the wall time: the
same command on the same machine gives a like model, not the same bytes. A usable model is in
FOLDER from the first minutes on and is replaced every `--save_minutes`.

Optimizer: Muon (Jordan et al. 2024) for kernels, Adam for embeddings, biases and norms.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from saejax.data import bpe, bpe_train, tokens
from saejax.data.corpus import Document
from saejax.subjects import gpt2, hf, material, model_card
from saejax.subjects.gpt2 import GPT2Config, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How the embedded subject is made.

    Attributes:
      out: folder to write.
      tokenizer: an existing tokenizer.json to use instead of training one, or ''.
      minutes: wall time of the training loop.
      save_minutes: time between provisional models.
      vocab_size, context, d_model, n_layers, n_heads: shape of the model.
      batch: contexts in a step.
      lr: learning rate of Muon (its updates have a root mean square of 0.2).
      adam: learning rate of Adam as a multiple of lr.
      weight_decay: decoupled, on kernels.
      mix_start, mix_end: share of each batch from the standard library, linear in time between.
      warmup, decay: shares of the time for the linear rise and the linear fall to zero.
      seed: of weights and batches.
    """

    out: str
    tokenizer: str = ""
    minutes: float = 70.0
    save_minutes: float = 5.0
    vocab_size: int = 4096
    context: int = 128
    d_model: int = 192
    n_layers: int = 4
    n_heads: int = 4
    batch: int = 32
    lr: float = 3e-3
    adam: float = 1.0
    weight_decay: float = 0.1
    mix_start: float = 0.3
    mix_end: float = 0.75
    warmup: float = 0.02
    decay: float = 0.45
    seed: int = 0

    def __post_init__(self):
        if not self.out:
            raise ValueError("--out is empty: name the folder to write the model to")
        if self.minutes <= 0:
            raise ValueError(f"--minutes = {self.minutes}: must be positive")


class Batches:
    """Windows of T + 1 tokens that never cross a document, each epoch cut at another phase."""

    def __init__(self, documents: Sequence[np.ndarray], length: int, rng: np.random.Generator):
        self._documents = [d for d in documents if len(d) > length]
        self._length, self._rng = length, rng
        self._queue: list[tuple[int, int]] = []

    def take(self, n: int) -> np.ndarray:
        """[n, length + 1] int32."""
        while len(self._queue) < n:
            self._queue = self._epoch() + self._queue
        left = len(self._queue) - n
        chosen, self._queue = self._queue[left:], self._queue[:left]
        rows = [self._documents[i][at : at + self._length + 1] for i, at in chosen]
        return np.array(rows, np.int32).reshape(n, self._length + 1)

    def _epoch(self) -> list[tuple[int, int]]:
        windows = []
        for i, document in enumerate(self._documents):
            phase = int(self._rng.integers(1, self._length + 1))
            starts = [0, *range(phase, len(document) - self._length, self._length)]
            windows += [(i, start) for start in starts]
        return [windows[i] for i in self._rng.permutation(len(windows))]


def encode_all(documents: Sequence[Document], tokenizer: bpe.Tokenizer) -> list[np.ndarray]:
    """Token ids of each document, `<|endoftext|>` first."""
    return [np.array([tokenizer.eot_id, *tokenizer.encode(d.text)], np.uint16) for d in documents]


def held_out_windows(documents: Sequence[np.ndarray], length: int) -> np.ndarray:
    """All whole windows [N, length + 1], stride length: every target token occurs once."""
    return np.stack(
        [d[at : at + length + 1] for d in documents for at in range(0, len(d) - length, length)]
    ).astype(np.int32)


def losses(params: Params, config: GPT2Config, x_BT: jax.Array) -> jax.Array:
    """Cross entropy in nats of each next token: [B, T - 1]."""
    logits = gpt2.apply(params, config, x_BT[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, x_BT[:, 1:])


_eval = jax.jit(losses, static_argnums=1)


def measure(params: Params, config: GPT2Config, windows: np.ndarray) -> float:
    """Mean nats per token over windows, in chunks of 16."""
    total = sum(
        float(np.asarray(_eval(params, config, windows[i : i + 16]), np.float64).sum())
        for i in range(0, len(windows), 16)
    )
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def make_optimizer(cfg: PretrainConfig, params: Params) -> optax.GradientTransformation:
    """Clipping, then Muon on kernels and Adam on the rest, at unit learning rate."""
    dimensions = jax.tree_util.tree_map_with_path(
        lambda path, x: optax.contrib.MuonDimensionNumbers() if path[-1].key == "kernel" else None,
        params,
    )
    muon = optax.contrib.muon(
        1.0,
        consistent_rms=0.2,
        weight_decay=cfg.weight_decay,
        adam_learning_rate=cfg.adam,
        adam_b2=0.95,
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(optimizer, config, params, state, x_BT, lr):
    """One update; returns parameters, optimizer state and the loss in nats."""
    loss, grads = jax.value_and_grad(lambda p: losses(p, config, x_BT).mean())(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, jax.tree.map(lambda u: lr * u, updates)), state, loss


def learning_rate(cfg: PretrainConfig, share: float) -> float:
    """Linear rise, flat, linear fall to zero, by the share of the time that has passed."""
    return cfg.lr * min(1.0, share / cfg.warmup, max(0.0, (1 - share) / cfg.decay))


def rounded(params: Params) -> Params:
    """The parameters as the file holds them: through bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)


def run_training(
    cfg: PretrainConfig,
    config: GPT2Config,
    library: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    windows: np.ndarray,
    nats_to_bits_per_byte: float,
) -> tuple[Params, dict[str, Any]]:
    """The training loop; prints a line every half minute and saves provisional models."""
    rng = np.random.default_rng(cfg.seed)
    sources = [Batches(d, cfg.context, rng) for d in (library, other)]
    params = gpt2.init(jax.random.key(cfg.seed), config)
    optimizer = make_optimizer(cfg, params)
    state = optimizer.init(params)
    out, quick = pathlib.Path(cfg.out), windows[:: max(1, len(windows) // 128)]

    def next_batch(share: float) -> tuple[np.ndarray, int]:
        mix = cfg.mix_start + (cfg.mix_end - cfg.mix_start) * share
        n_library = int(mix * cfg.batch + rng.random())  # right on average
        parts = [sources[0].take(n_library), sources[1].take(cfg.batch - n_library)]
        return np.concatenate(parts), n_library

    params, state, loss = train_step(optimizer, config, params, state, next_batch(0.0)[0], 0.0)
    start, last_print, last_save, steps, from_library = time.monotonic(), 0.0, 0.0, 0, 0
    while (passed := time.monotonic() - start) < 60 * cfg.minutes:
        share = passed / 60 / cfg.minutes
        batch, n_library = next_batch(share)
        loss.block_until_ready()  # one step in flight, or the clock runs ahead of the work
        params, state, loss = train_step(
            optimizer, config, params, state, batch, learning_rate(cfg, share)
        )
        steps, from_library = steps + 1, from_library + n_library
        if passed - last_print >= 30:
            last_print, seen = passed, steps * cfg.batch * cfg.context
            print(
                f"{share:6.1%} step {steps} tokens {seen / 1e6:.2f}M ({seen / passed:.0f}/s) "
                f"train {float(loss):.3f}",
                flush=True,
            )
        if passed - last_save >= 60 * cfg.save_minutes:
            last_save, nats = passed, measure(params, config, quick)
            bits = nats * nats_to_bits_per_byte
            print(f"held out (sample) {nats:.4f} nats/token {bits:.4f} bits/byte", flush=True)
            hf.write_folder(out, config, params)
    wall = time.monotonic() - start
    params = rounded(params)
    hf.write_folder(out, config, params)
    return params, {
        "steps": steps,
        "tokens_seen": steps * cfg.batch * cfg.context,
        "tokens_seen_library": from_library * cfg.context,
        "wall_seconds": wall,
        "final_train_loss": float(loss),
    }


def parse(argv: Sequence[str] | None) -> PretrainConfig:
    """A configuration from command line flags, one for each field."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(PretrainConfig):
        required = field.default is dataclasses.MISSING
        kind = {"str": str, "float": float, "int": int}[field.type]
        default = None if required else field.default
        parser.add_argument(f"--{field.name}", type=kind, required=required, default=default)
    return PretrainConfig(**vars(parser.parse_args(argv)))


def make_tokenizer(cfg: PretrainConfig, library: Sequence[Document]) -> bpe.Tokenizer:
    """The tokenizer named, or one trained on the library; written to the folder either way."""
    out = pathlib.Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if cfg.tokenizer:
        tokenizer = bpe.Tokenizer.load(cfg.tokenizer)
    else:
        tokenizer = bpe_train.train([document.text for document in library], cfg.vocab_size)
    tokenizer.save(out / "tokenizer.json")
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Collects, tokenises, trains, measures, and writes the folder and its model card."""
    cfg = parse(argv)
    out, data = pathlib.Path(cfg.out), material.collect()
    print(f"library {len(data.library)} files, other {len(data.other)}", flush=True)
    print(f"held out {len(data.held_out)}; left out {data.left_out}", flush=True)
    tokenizer = make_tokenizer(cfg, data.library)
    library, other, held = (
        encode_all(d, tokenizer) for d in (data.library, data.other, data.held_out)
    )
    windows = held_out_windows(held, cfg.context)
    bytes_per_token = float(tokens.byte_lengths(tokenizer)[windows[:, 1:]].mean())
    scale = 1 / (bytes_per_token * math.log(2))
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        n_positions=cfg.context,
        d_model=cfg.d_model,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        d_mlp=4 * cfg.d_model,
    )
    params, train = run_training(cfg, config, library, other, windows, scale)
    nats = measure(params, config, windows)
    print(f"held out {nats:.4f} nats/token, {nats * scale:.4f} bits/byte", flush=True)
    record = {
        "options": dataclasses.asdict(cfg),
        "config": dataclasses.asdict(config),
        "tokenizer_material": "a file that was given" if cfg.tokenizer else "the first part alone",
        "train": train,
        "bytes_per_token": bytes_per_token,
        "held_out_nats_per_token": nats,
        "held_out_bits_per_byte": nats * scale,
        "model_bytes": (out / "model.safetensors").stat().st_size,
        **model_card.describe(config, data, tokenizer, library, other, held),
    }
    (out / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "README.md").write_text(model_card.render(record))


if __name__ == "__main__":
    main()
