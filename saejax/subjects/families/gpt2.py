"""GPT-2: learned positions, layer norm, fused kernels stored [in, out] (Radford et al. 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from saejax.subjects.decoder import ACTIVATIONS, Config
from saejax.subjects.families import fields
from saejax.subjects.layout import Family, Fused, Names


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Shape of a GPT-2.

    Attributes:
      vocab_size: number of token ids, V.
      n_positions: longest context, P.
      d_model: width of the residual stream, D.
      n_layers: number of blocks.
      n_heads: attention heads; must divide d_model.
      d_mlp: width of the MLP's hidden layer.
      epsilon: added to the variance in layer norm.
      activation: one of gelu_new, gelu_pytorch_tanh, gelu, relu, silu.
      tied: whether the output matrix is the transposed token embedding.
    """

    vocab_size: int
    n_positions: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    epsilon: float = 1e-5
    activation: str = "gelu_new"
    tied: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "d_model", "n_layers", "n_heads", "d_mlp"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPT-2 config: {name} = {getattr(self, name)}, must be positive")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"GPT-2 config: n_heads = {self.n_heads} must divide d_model = {self.d_model}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"GPT-2 config: activation_function = {self.activation!r} is not supported; "
                f"allowed: {', '.join(ACTIVATIONS)}"
            )

    @property
    def decoder(self) -> Config:
        """What the decoder computes for this shape."""
        return Config(
            vocab_size=self.vocab_size,
            n_positions=self.n_positions,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            d_head=self.d_model // self.n_heads,
            d_mlp=self.d_mlp,
            activation=self.activation,
            epsilon=self.epsilon,
            norm="layer",
            gated=False,
            biases=("q", "k", "v", "o", "up", "down"),
            learned_positions=True,
            tied=self.tied,
        )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> GPT2Config:
        """Reads the content of a transformers `config.json`.

        Raises:
          ValueError: a field is missing, or asks for something that is not implemented.
        """
        fields.require(raw, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        fields.refuse_unless(
            raw,
            {
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
        )
        return cls(
            vocab_size=raw["vocab_size"],
            n_positions=raw["n_positions"],
            d_model=raw["n_embd"],
            n_layers=raw["n_layer"],
            n_heads=raw["n_head"],
            d_mlp=fields.whole(raw, "n_inner", 4 * raw["n_embd"]),
            epsilon=fields.positive(raw, "layer_norm_epsilon", 1e-5),
            activation=fields.activation(raw, "activation_function", "gelu_new"),
            tied=fields.flag(raw, "tie_word_embeddings", True),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a transformers `config.json` for this model."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.n_positions,
            "n_ctx": self.n_positions,
            "n_embd": self.d_model,
            "n_layer": self.n_layers,
            "n_head": self.n_heads,
            "n_inner": self.d_mlp,
            "layer_norm_epsilon": self.epsilon,
            "activation_function": self.activation,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }


def names(cfg: Config) -> Names:
    """Names of GPT-2's tensors; kernels are stored [in, out]."""
    width = cfg.d_model
    take = {name: slice(j * width, (j + 1) * width) for j, name in enumerate("qkv")}
    return Names(
        embed="wte.weight",
        pos="wpe.weight",
        final="ln_f",
        layer="h.{}.",
        parts={
            "o": "attn.c_proj",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
            "ln_1": "ln_1",
            "ln_2": "ln_2",
        },
        fused=Fused(tensor="attn.c_attn", columns=3 * width, take=take),
        transposed=False,
    )


GPT2 = Family(
    read_config=GPT2Config.from_hf,
    names=names,
    prefixes=("transformer.",),
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",  # masks, buffers of old files
)
FAMILIES = {"gpt2": GPT2}
