"""GPT-NeoX and Pythia: partial RoPE, layer norm, attention and MLP in parallel or in sequence.

Black et al. 2022. The fused projection's outputs are ordered by head, then query, key, value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from saejax.subjects.decoder import Config
from saejax.subjects.families import fields
from saejax.subjects.layout import Family, Fused, Names
from saejax.subjects.rope import read_rope


def read_config(raw: Mapping[str, Any]) -> Config:
    """A configuration from config.json, of transformers 5 or older.

    Raises:
      ValueError: a field is missing, or asks for something that is not implemented.
    """
    fields.require(
        raw,
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("intermediate_size", "max_position_embeddings"),
    )
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    if heads < 1 or width % heads:
        raise ValueError(
            f"config.json: num_attention_heads = {heads} must divide hidden_size = {width}"
        )
    rope = fields.table(raw, "rope_parameters") or fields.table(raw, "rope_scaling")
    share = fields.number(rope, "partial_rotary_factor", None)
    share = fields.positive(raw, "rotary_pct", 0.25) if share is None else share
    attention = ("q", "k", "v", "o") if fields.flag(raw, "attention_bias", True) else ()
    return Config(
        vocab_size=raw["vocab_size"],
        n_positions=raw["max_position_embeddings"],
        d_model=width,
        n_layers=raw["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=heads,
        d_head=width // heads,
        d_mlp=raw["intermediate_size"],
        activation=fields.activation(raw, "hidden_act", "gelu"),
        epsilon=fields.positive(raw, "layer_norm_eps", 1e-5),
        norm="layer",
        gated=False,
        parallel=fields.flag(raw, "use_parallel_residual", True),
        biases=(*attention, "up", "down"),
        ropes=raw["num_hidden_layers"]
        * (
            read_rope(
                rope,
                dims=int(width // heads * share),
                theta=fields.number(raw, "rotary_emb_base", 10000.0),
                max_positions=raw["max_position_embeddings"],
            ),
        ),
        tied=fields.flag(raw, "tie_word_embeddings", False),
    )


def names(cfg: Config) -> Names:
    """Names of GPT-NeoX's tensors."""
    column = np.arange(3 * cfg.d_model).reshape(cfg.n_heads, 3, cfg.d_head)
    take = {name: column[:, j].ravel() for j, name in enumerate("qkv")}
    return Names(
        embed="embed_in.weight",
        final="final_layer_norm",
        head="embed_out.weight",
        layer="layers.{}.",
        parts={
            "o": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
        },
        fused=Fused(tensor="attention.query_key_value", columns=3 * cfg.d_model, take=take),
    )


NEOX = Family(
    read_config=read_config,
    names=names,
    prefixes=("gpt_neox.",),
    ignored=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
FAMILIES = {"gpt_neox": NEOX}
