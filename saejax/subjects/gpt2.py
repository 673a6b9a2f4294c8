"""GPT-2 as this package trains it: random parameters, the forward pass, and the way to files.

How the files of any GPT-2 are read is in `families/gpt2.py`, what it computes in `decoder.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saejax.subjects import decoder, layout, sites
from saejax.subjects.decoder import Params
from saejax.subjects.families.gpt2 import GPT2, GPT2Config
from saejax.subjects.taps import Tap, identity_tap

__all__ = ["GPT2Config", "Params", "apply", "from_hf", "init", "site_widths", "tensor_shapes"]


def site_widths(cfg: GPT2Config) -> dict[str, int]:
    """Every site in the order of the forward pass, with the width of its vectors."""
    return sites.site_widths(cfg.decoder)


def init(key: jax.Array, cfg: GPT2Config) -> Params:
    """Random float32 parameters: normal with std 0.02 for embeddings, D**-0.5 for kernels."""
    keys = iter(jax.random.split(key, 6 * cfg.n_layers + 3))
    width, std = cfg.d_model, cfg.d_model**-0.5
    small = std / math.sqrt(2 * cfg.n_layers)  # kernels that write to the residual stream

    def linear(n_in: int, n_out: int, scale: float) -> Params:
        kernel = scale * jax.random.normal(next(keys), (n_in, n_out))
        return {"kernel": kernel, "bias": jnp.zeros(n_out)}

    def norm() -> Params:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    layers = [
        {
            "ln_1": norm(),
            **{name: linear(width, width, std) for name in ("q", "k", "v")},
            "o": linear(width, width, small),
            "ln_2": norm(),
            "up": linear(width, cfg.d_mlp, std),
            "down": linear(cfg.d_mlp, width, small * math.sqrt(width / cfg.d_mlp)),
        }
        for _ in range(cfg.n_layers)
    ]
    params = {
        "embed": 0.02 * jax.random.normal(next(keys), (cfg.vocab_size, width)),
        "pos": 0.02 * jax.random.normal(next(keys), (cfg.n_positions, width)),
        "layers": layers,
        "final": norm(),
    }
    if not cfg.tied:
        params["head"] = std * jax.random.normal(next(keys), (width, cfg.vocab_size))
    return params


def apply(
    params: Params,
    cfg: GPT2Config,
    tokens_BT: jax.Array,
    tap: Tap = identity_tap,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Next-token logits; see `decoder.apply`."""
    return decoder.apply(params, cfg.decoder, tokens_BT, tap, dtype)


def tensor_shapes(cfg: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Names (without the `transformer.` prefix) and shapes of a transformers GPT-2's tensors."""
    return {piece.tensor: piece.shape for piece in GPT2.pieces(cfg.decoder).values()}


def from_hf(tensors: Mapping[str, np.ndarray], cfg: GPT2Config) -> Params:
    """Parameters (float32 numpy) from the tensors of a transformers GPT-2.

    Names may carry the `transformer.` prefix or not. Buffers of old files (`attn.bias`,
    `attn.masked_bias`) are ignored, and so is `lm_head.weight`, a copy, of a tied model.

    Raises:
      ValueError: tensors are missing, unknown, or of the wrong shape; all are named. Or a tied head
        is no copy.
    """
    return layout.from_tensors(GPT2, cfg.decoder, tensors)


def to_hf(params: Params, cfg: GPT2Config) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`, with the `transformer.` prefix."""
    out = layout.to_tensors(GPT2, cfg.decoder, params)
    return {n if n in layout.HEADS else f"transformer.{n}": value for n, value in out.items()}
