"""GPT-2 as a pure function of a parameter tree, with a tap at every site.

Architecture: Radford et al. 2019. Tensor names in files are those of the `transformers` library.
Kernels are [in, out] in the tree and in GPT-2's files alike.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
Tap = Callable[[str, jax.Array], jax.Array]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
LAYER_SITES = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_act", "mlp_out", "resid_post")


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
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"GPT-2 config: activation_function = {self.activation!r} is not supported; "
                f"allowed: {', '.join(_ACTIVATIONS)}"
            )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> GPT2Config:
        """Reads the content of a transformers `config.json`.

        Raises:
          ValueError: a field is missing, or asks for something that is not implemented.
        """
        required = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        if missing := [name for name in required if not isinstance(raw.get(name), int)]:
            raise ValueError(f"config.json: whole numbers are needed for {', '.join(missing)}")
        unsupported = {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        }
        for name, allowed in unsupported.items():
            if raw.get(name, allowed) is not allowed:
                raise ValueError(
                    f"config.json: {name} = {raw[name]} is not supported; allowed: {allowed}"
                )
        return cls(
            vocab_size=raw["vocab_size"],
            n_positions=raw["n_positions"],
            d_model=raw["n_embd"],
            n_layers=raw["n_layer"],
            n_heads=raw["n_head"],
            d_mlp=raw.get("n_inner") or 4 * raw["n_embd"],
            epsilon=float(raw.get("layer_norm_epsilon", 1e-5)),
            activation=raw.get("activation_function", "gelu_new"),
            tied=bool(raw.get("tie_word_embeddings", True)),
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


def site_widths(cfg: GPT2Config) -> dict[str, int]:
    """Every site in the order of the forward pass, with the width of its vectors."""
    sites = {"embed": cfg.d_model}
    for i in range(cfg.n_layers):
        for name in LAYER_SITES:
            sites[f"{i}.{name}"] = cfg.d_mlp if name == "mlp_act" else cfg.d_model
    return sites | {"final": cfg.d_model}


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


def identity_tap(site: str, x: jax.Array) -> jax.Array:
    """The tap that changes nothing."""
    del site
    return x


def apply(
    params: Params,
    cfg: GPT2Config,
    tokens_BT: jax.Array,
    tap: Tap = identity_tap,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Next-token logits.

    Args:
      params: tree as `init` makes it.
      cfg: shape of the model.
      tokens_BT: integer [B, T], T at most n_positions.
      tap: called as tap(site, x) at every site of `site_widths`, with x of [B, T, width]; what it
        returns takes the place of x.
      dtype: type of the matrix products; layer norm and logits are float32.

    Returns:
      float32 [B, T, V].

    Raises:
      ValueError: T is above n_positions.
    """
    length = tokens_BT.shape[1]
    if length > cfg.n_positions:
        raise ValueError(
            f"a context of {length} tokens is longer than the model's {cfg.n_positions} positions"
        )
    x_BTD = params["embed"].astype(dtype)[tokens_BT] + params["pos"].astype(dtype)[None, :length]
    x_BTD = tap("embed", x_BTD)
    for i, layer in enumerate(params["layers"]):
        x_BTD = _block(layer, cfg, i, x_BTD, tap)
    x_BTD = tap("final", _layer_norm(x_BTD, params["final"], cfg.epsilon))
    head_DV = params["embed"].T if cfg.tied else params["head"]
    return jnp.matmul(x_BTD, head_DV.astype(dtype), preferred_element_type=jnp.float32)


def _block(layer: Params, cfg: GPT2Config, i: int, x_BTD: jax.Array, tap: Tap) -> jax.Array:
    x_BTD = tap(f"{i}.resid_pre", x_BTD)
    z_BTD = _attention(layer, cfg, _layer_norm(x_BTD, layer["ln_1"], cfg.epsilon))
    z_BTD = tap(f"{i}.attn_z", z_BTD)
    x_BTD = tap(f"{i}.resid_mid", x_BTD + tap(f"{i}.attn_out", _linear(z_BTD, layer["o"])))
    hidden_BTH = _linear(_layer_norm(x_BTD, layer["ln_2"], cfg.epsilon), layer["up"])
    hidden_BTH = tap(f"{i}.mlp_act", _ACTIVATIONS[cfg.activation](hidden_BTH))
    return tap(f"{i}.resid_post", x_BTD + tap(f"{i}.mlp_out", _linear(hidden_BTH, layer["down"])))


def _attention(layer: Params, cfg: GPT2Config, x_BTD: jax.Array) -> jax.Array:
    batch, length, _ = x_BTD.shape
    q, k, v = (_linear(x_BTD, layer[n]).reshape(batch, length, cfg.n_heads, -1) for n in "qkv")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x_BTD.shape)


def _linear(x: jax.Array, p: Params) -> jax.Array:
    y = x @ p["kernel"].astype(x.dtype)
    return y + jnp.broadcast_to(p["bias"].astype(x.dtype), y.shape)


def _layer_norm(x: jax.Array, p: Params, epsilon: float) -> jax.Array:
    centred = x.astype(jnp.float32)
    centred = centred - centred.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon)
    scale, bias = (jnp.broadcast_to(p[name], y.shape) for name in ("scale", "bias"))
    return (y * scale + bias).astype(x.dtype)


def tensor_shapes(cfg: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Names (without the `transformer.` prefix) and shapes of a transformers GPT-2's tensors."""
    width, hidden = cfg.d_model, cfg.d_mlp
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (cfg.vocab_size, width),
        "wpe.weight": (cfg.n_positions, width),
    }
    for i in range(cfg.n_layers):
        for name, n_in, n_out in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, hidden),
            ("mlp.c_proj", hidden, width),
        ):
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = (n_in, n_out), (n_out,)
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (width,), f"h.{i}.{name}.bias": (width,)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return shapes if cfg.tied else shapes | {"lm_head.weight": (cfg.vocab_size, width)}


def from_hf(tensors: Mapping[str, np.ndarray], cfg: GPT2Config) -> Params:
    """Parameters (float32 numpy) from the tensors of a transformers GPT-2.

    Names may carry the `transformer.` prefix or not. Buffers of old files (`attn.bias`,
    `attn.masked_bias`) and the tied copy `lm_head.weight` are ignored.

    Raises:
      ValueError: tensors are missing, unknown, or of the wrong shape; all are named.
    """
    found = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    ignored = {f"h.{i}.attn.{n}" for i in range(cfg.n_layers) for n in ("bias", "masked_bias")}
    if cfg.tied:
        ignored.add("lm_head.weight")
    wanted = tensor_shapes(cfg)
    faults = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in found]
    faults += [f"unknown {name}" for name in found if name not in wanted and name not in ignored]
    faults += [
        f"{name} has shape {tuple(found[name].shape)}, must be {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(
            f"the tensors do not fit the GPT-2 of config.json: {'; '.join(faults[:8])}{more}"
        )
    x = {name: np.asarray(found[name], dtype=np.float32) for name in wanted}
    params: Params = {"embed": x["wte.weight"], "pos": x["wpe.weight"]}
    params["layers"] = [_layer_from_hf(x, f"h.{i}.") for i in range(cfg.n_layers)]
    params["final"] = {"scale": x["ln_f.weight"], "bias": x["ln_f.bias"]}
    return params if cfg.tied else params | {"head": x["lm_head.weight"].T}


def _layer_from_hf(x: Mapping[str, np.ndarray], at: str) -> Params:
    def linear(name: str) -> Params:
        return {"kernel": x[f"{at}{name}.weight"], "bias": x[f"{at}{name}.bias"]}

    def norm(name: str) -> Params:
        return {"scale": x[f"{at}{name}.weight"], "bias": x[f"{at}{name}.bias"]}

    fused = linear("attn.c_attn")
    parts = zip("qkv", np.split(fused["kernel"], 3, axis=1), np.split(fused["bias"], 3))
    layer = {name: {"kernel": kernel, "bias": bias} for name, kernel, bias in parts}
    layer |= {"o": linear("attn.c_proj"), "up": linear("mlp.c_fc"), "down": linear("mlp.c_proj")}
    return layer | {"ln_1": norm("ln_1"), "ln_2": norm("ln_2")}


def to_hf(params: Params, cfg: GPT2Config) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`, with the `transformer.` prefix."""
    params = jax.tree.map(np.asarray, params)
    out = {"wte.weight": params["embed"], "wpe.weight": params["pos"]}
    for i, layer in enumerate(params["layers"]):
        fused = {
            part: np.concatenate([layer[name][part] for name in "qkv"], axis=-1)
            for part in ("kernel", "bias")
        }
        linears = {"attn.c_attn": fused, "attn.c_proj": layer["o"]}
        linears |= {"mlp.c_fc": layer["up"], "mlp.c_proj": layer["down"]}
        for name, p in linears.items():
            out |= {f"h.{i}.{name}.weight": p["kernel"], f"h.{i}.{name}.bias": p["bias"]}
        for name in ("ln_1", "ln_2"):
            out |= {f"h.{i}.{name}.weight": layer[name]["scale"]}
            out |= {f"h.{i}.{name}.bias": layer[name]["bias"]}
    out |= {"ln_f.weight": params["final"]["scale"], "ln_f.bias": params["final"]["bias"]}
    out = {f"transformer.{name}": np.ascontiguousarray(value) for name, value in out.items()}
    if not cfg.tied:
        out["lm_head.weight"] = np.ascontiguousarray(params["head"].T)
    return out
