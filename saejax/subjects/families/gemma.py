"""Gemma 2 and 3 (text): norms of 1 + weight before and after, soft caps, windows, scaled embedding.

Gemma Team 2024, 2025. A multimodal Gemma 3 is read as its text model; its vision tower is left out.
Early files of Gemma 3 name only what differs from the defaults of transformers, which stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saejax.subjects.decoder import Config
from saejax.subjects.families import fields, llama
from saejax.subjects.layout import Family
from saejax.subjects.rope import Rope, read_rope

_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
_GEMMA2 = {**_DEFAULTS, "vocab_size": 256000, "max_position_embeddings": 8192}
_GEMMA3 = {**_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}


def _read(raw: Mapping[str, Any], given: dict, kinds: list[str], caps: tuple, **more) -> Config:
    """What both generations share; `caps` are the defaults of the attention's and the logits'."""
    fields.refuse_unless(raw, {"use_bidirectional_attention": False, "mlp_bias": False})
    return Config(
        **given,
        activation=fields.activation(raw, "hidden_activation", "gelu_pytorch_tanh"),
        scale_plus_one=True,
        post_norms=True,
        biases=llama.ATTENTION if fields.flag(raw, "attention_bias", False) else (),
        windows=fields.windows(kinds, fields.whole(raw, "sliding_window", 4096)),
        attention_scale=fields.positive(raw, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_cap=fields.number(raw, "attn_logit_softcapping", caps[0]),
        logit_cap=fields.number(raw, "final_logit_softcapping", caps[1]),
        embed_scale=given["d_model"] ** 0.5,
        tied=fields.flag(raw, "tie_word_embeddings", True),
        **more,
    )


def read_gemma2(raw: Mapping[str, Any]) -> Config:
    """A configuration from config.json, of transformers 5 or older; ValueError if it cannot be."""
    raw = _GEMMA2 | dict(raw)
    given = llama.shape(raw)
    n_layers = given["n_layers"]
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(n_layers)]
    kinds = fields.layer_types(raw, n_layers, kinds)
    ropes = n_layers * (llama.rope_of(raw, given["d_head"]),)
    return _read(raw, given, kinds, (50.0, 30.0), ropes=ropes)


def read_gemma3(raw: Mapping[str, Any]) -> Config:
    """The same for Gemma 3's text model; its full-attention layers have a RoPE of their own."""
    raw = _GEMMA3 | dict(raw)
    fields.refuse_unless(raw, {"attn_logit_softcapping": None})  # transformers passes it over
    given = llama.shape(raw)
    n_layers, every = given["n_layers"], fields.whole(raw, "sliding_window_pattern", 6)
    kinds = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n_layers)
    ]
    kinds = fields.layer_types(raw, n_layers, kinds)
    ropes = _gemma3_ropes(raw, given["d_head"])
    return _read(
        raw, given, kinds, (None, None), qk_norm=True, ropes=tuple(ropes[kind] for kind in kinds)
    )


def _gemma3_ropes(raw: Mapping[str, Any], d_head: int) -> dict[str, Rope]:
    both = fields.table(raw, "rope_parameters")
    if not both:
        both = {"full_attention": raw.get("rope_scaling")}
    elif unknown := sorted(set(both) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"config.json: rope_parameters of Gemma 3 has {', '.join(unknown)}; it must have "
            f"full_attention and sliding_attention"
        )
    theta = {
        "full_attention": fields.number(raw, "rope_theta", 1e6),
        "sliding_attention": fields.number(raw, "rope_local_base_freq", 1e4),
    }
    ropes = {}
    for kind, base in theta.items():
        parameters = fields.table(both, kind)
        fields.refuse_unless(parameters, {"partial_rotary_factor": 1.0})
        ropes[kind] = read_rope(
            parameters, dims=d_head, theta=base, max_positions=raw["max_position_embeddings"]
        )
    return ropes


def read_multimodal(raw: Mapping[str, Any]) -> Config:
    """The text model of a multimodal Gemma 3."""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError("config.json: a multimodal Gemma 3 needs an object text_config")
    if text.get("model_type", "gemma3_text") != "gemma3_text":
        raise ValueError(f"config.json: text_config.model_type = {text['model_type']!r}")
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return read_gemma3({**text, "tie_word_embeddings": tied})


_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_PICTURES = r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*"
FAMILIES = {
    "gemma2": Family(read_config=read_gemma2, names=llama.names, prefixes=("model.",)),
    "gemma3_text": Family(read_config=read_gemma3, names=llama.names, prefixes=("model.",)),
    "gemma3": Family(
        read_config=read_multimodal, names=llama.names, prefixes=_PREFIXES, ignored=_PICTURES
    ),
}
