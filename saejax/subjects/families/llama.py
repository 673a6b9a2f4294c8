"""Llama 1 to 3 and Mistral: RMS norm, RoPE, grouped-query attention, gated MLP.

Touvron et al. 2023; Grattafiori et al. 2024 (RoPE scaling 'llama3'); Jiang et al. 2023 (windows).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saejax.subjects.decoder import Config
from saejax.subjects.families import fields
from saejax.subjects.layout import Family, Names
from saejax.subjects.rope import Rope, read_rope

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
IGNORED = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def shape(raw: Mapping[str, Any], d_head: int | None = None, n_kv: int | None = None) -> dict:
    """The fields of a Config that all relatives of Llama write alike.

    Args:
      raw: config.json.
      d_head: a head's width where the file names none; hidden_size / heads by default.
      n_kv: key and value heads where the file names none; as many as query heads by default.
    """
    fields.require(
        raw,
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("intermediate_size", "max_position_embeddings"),
    )
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    if heads < 1 or (d_head is None and raw.get("head_dim") is None and width % heads):
        raise ValueError(
            f"config.json: num_attention_heads = {heads} must divide hidden_size = {width}, or "
            f"head_dim be given"
        )
    return {
        "vocab_size": raw["vocab_size"],
        "n_positions": raw["max_position_embeddings"],
        "d_model": width,
        "n_layers": raw["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": fields.whole(raw, "num_key_value_heads", n_kv or heads),
        "d_head": fields.whole(raw, "head_dim", d_head or width // heads),
        "d_mlp": raw["intermediate_size"],
        "epsilon": fields.positive(raw, "rms_norm_eps", 1e-6),
    }


def rope_of(raw: Mapping[str, Any], d_head: int, theta: float = 10000.0) -> Rope:
    """The rotary embedding that all layers share.

    Raises:
      ValueError: it is partial, differs between layers, or is of a kind not implemented.
    """
    parameters = fields.table(raw, "rope_parameters") or fields.table(raw, "rope_scaling")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError("config.json: rope_parameters differ between layers: not supported")
    for source in (raw, parameters):
        fields.refuse_unless(source, {"partial_rotary_factor": 1.0})
    return read_rope(
        parameters,
        dims=d_head,
        theta=fields.number(raw, "rope_theta", theta),
        max_positions=raw["max_position_embeddings"],
    )


def read_llama(raw: Mapping[str, Any]) -> Config:
    """A configuration from config.json, of transformers 5 or older; ValueError if it cannot be."""
    given = shape(raw)
    attention = ATTENTION if fields.flag(raw, "attention_bias", False) else ()
    mlp = MLP if fields.flag(raw, "mlp_bias", False) else ()
    return Config(
        **given,
        activation=fields.activation(raw, "hidden_act", "silu"),
        biases=(*attention, *mlp),
        ropes=given["n_layers"] * (rope_of(raw, given["d_head"]),),
        tied=fields.flag(raw, "tie_word_embeddings", False),
    )


def read_mistral(raw: Mapping[str, Any]) -> Config:
    """The same for Mistral, whose layers all have a window, or none."""
    fields.refuse_unless(raw, {"attention_bias": False, "mlp_bias": False, "layer_types": None})
    given = shape(raw, n_kv=8)
    window = raw.get("sliding_window", 4096)
    kinds = given["n_layers"] * ["full_attention" if window is None else "sliding_attention"]
    return Config(
        **given,
        activation=fields.activation(raw, "hidden_act", "silu"),
        ropes=given["n_layers"] * (rope_of(raw, given["d_head"]),),
        windows=fields.windows(kinds, window),
        tied=fields.flag(raw, "tie_word_embeddings", False),
    )


def names(cfg: Config) -> Names:
    """Names of the tensors of Llama and its relatives."""
    parts = {name: f"self_attn.{name}_proj" for name in ATTENTION}
    parts |= {name: f"mlp.{name}_proj" for name in MLP}
    parts |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    parts |= {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    if cfg.post_norms:  # what Llama calls post_attention_layernorm stands before the MLP
        parts |= {
            "post_attn": "post_attention_layernorm",
            "ln_2": "pre_feedforward_layernorm",
            "post_mlp": "post_feedforward_layernorm",
        }
    return Names(embed="embed_tokens.weight", final="norm", layer="layers.{}.", parts=parts)


FAMILIES = {
    "llama": Family(read_config=read_llama, names=names, prefixes=("model.",), ignored=IGNORED),
    "mistral": Family(read_config=read_mistral, names=names, prefixes=("model.",), ignored=IGNORED),
}
