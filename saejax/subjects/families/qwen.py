"""Qwen 2, 2.5 and 3: Llama's blocks with biases on q, k, v (2) or norms on q and k (3).

Yang et al. 2024, 2025. Layers from `max_window_layers` on may have a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saejax.subjects.decoder import Config
from saejax.subjects.families import fields, llama
from saejax.subjects.layout import Family


def _windows(raw: Mapping[str, Any], n_layers: int) -> tuple[int | None, ...]:
    used = fields.flag(raw, "use_sliding_window", False)
    window = raw.get("sliding_window", 4096) if used else None
    first = raw.get("max_window_layers", 28)
    if window is not None and type(first) is not int:
        raise ValueError(f"config.json: max_window_layers = {first!r}, a whole number is needed")
    kinds = [
        "sliding_attention" if window is not None and i >= first else "full_attention"
        for i in range(n_layers)
    ]
    return fields.windows(fields.layer_types(raw, n_layers, kinds), window)


def read_qwen2(raw: Mapping[str, Any]) -> Config:
    """A configuration from config.json, of transformers 5 or older; ValueError if it cannot be."""
    fields.refuse_unless(raw, {"attention_bias": True, "mlp_bias": False})
    given = llama.shape(raw)
    return Config(
        **given,
        activation=fields.activation(raw, "hidden_act", "silu"),
        biases=("q", "k", "v"),
        ropes=given["n_layers"] * (llama.rope_of(raw, given["d_head"]),),
        windows=_windows(raw, given["n_layers"]),
        tied=fields.flag(raw, "tie_word_embeddings", False),
    )


def read_qwen3(raw: Mapping[str, Any]) -> Config:
    """The same for Qwen 3, whose heads are 128 wide unless the file says otherwise."""
    fields.refuse_unless(raw, {"mlp_bias": False})
    given = llama.shape(raw, d_head=128)
    return Config(
        **given,
        activation=fields.activation(raw, "hidden_act", "silu"),
        qk_norm=True,
        biases=llama.ATTENTION if fields.flag(raw, "attention_bias", False) else (),
        ropes=given["n_layers"] * (llama.rope_of(raw, given["d_head"]),),
        windows=_windows(raw, given["n_layers"]),
        tied=fields.flag(raw, "tie_word_embeddings", False),
    )


FAMILIES = {
    "qwen2": Family(
        read_config=read_qwen2, names=llama.names, prefixes=("model.",), ignored=llama.IGNORED
    ),
    "qwen3": Family(
        read_config=read_qwen3, names=llama.names, prefixes=("model.",), ignored=llama.IGNORED
    ),
}
