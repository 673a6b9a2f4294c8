"""A decoder-only transformer as a pure function of a parameter tree, with a tap at every site.

One computation for all families; what differs between them is a field of `Config`, and
`families/` turns config.json into one. Kernels are [in, out]; attention heads are contiguous
columns. `attn_out` and `mlp_out` are what is added to the residual stream, after any norm that a
family puts behind them.

On accelerators float32 products may be computed with less precision, as JAX's default has it; wrap
the call in `jax.default_matmul_precision("highest")` to forbid that.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from saejax.subjects.rope import Rope, rotate
from saejax.subjects.taps import Tap, identity_tap

Params = dict[str, Any]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# Scores of so many queries are in memory at a time: long contexts need no more than short ones.
_QUERY_BLOCK = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What a decoder computes.

    Attributes:
      vocab_size: number of token ids, V.
      n_positions: longest context, P.
      d_model: width of the residual stream, D.
      n_layers: number of blocks.
      n_heads: query heads, H.
      n_kv_heads: key and value heads; divides n_heads.
      d_head: width of a head, K.
      d_mlp: width of the MLP's hidden layer.
      activation: a key of `ACTIVATIONS`.
      gated: the MLP multiplies the activation by a second projection.
      norm: 'layer' (mean removed, with bias) or 'rms'.
      epsilon: added to the variance in norms.
      scale_plus_one: norms multiply by 1 + scale (Gemma).
      post_norms: norms behind attention and MLP too (Gemma 2, 3).
      qk_norm: norms on queries and keys, per head (Qwen 3, Gemma 3).
      parallel: attention and MLP read the same residual stream (GPT-NeoX).
      biases: which of q, k, v, o, gate, up, down have a bias.
      learned_positions: position vectors are added to the embedding (GPT-2).
      ropes: rotary embedding of each layer; empty for none.
      windows: tokens each layer sees, itself included, None for all; empty for all in all layers.
      attention_scale: factor of the scores; d_head ** -0.5 if None.
      attention_cap: scores go through cap * tanh(score / cap).
      logit_cap: the same for logits.
      embed_scale: factor of the token embedding.
      tied: whether the output matrix is the transposed token embedding.
    """

    vocab_size: int
    n_positions: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    activation: str
    epsilon: float
    norm: str = "rms"
    gated: bool = True
    scale_plus_one: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    parallel: bool = False
    biases: tuple[str, ...] = ()
    learned_positions: bool = False
    ropes: tuple[Rope, ...] = ()
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embed_scale: float = 1.0
    tied: bool = False

    def __post_init__(self):
        sizes = ("vocab_size", "n_positions", "d_model", "n_layers", "n_heads", "n_kv_heads")
        for name in (*sizes, "d_head", "d_mlp"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"config: {name} = {value!r}, must be a positive whole number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"config: n_kv_heads = {self.n_kv_heads} must divide n_heads = {self.n_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"config: activation = {self.activation!r} is not implemented; allowed: "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.norm not in ("layer", "rms"):
            raise ValueError(f"config: norm = {self.norm!r}, must be 'layer' or 'rms'")
        for name in ("ropes", "windows"):
            if len(getattr(self, name)) not in (0, self.n_layers):
                raise ValueError(f"config: {name} must have an entry for each layer, or none")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"config: windows = {self.windows}, must be at least 1")

    @property
    def decoder(self) -> Config:
        """Itself: every family's configuration has this field."""
        return self


def leaf_shapes(cfg: Config) -> dict[tuple, tuple[int, ...]]:
    """Path and shape of every parameter; a path is the keys from the root of the tree."""
    shapes: dict[tuple, tuple[int, ...]] = {("embed",): (cfg.vocab_size, cfg.d_model)}
    if cfg.learned_positions:
        shapes["pos",] = (cfg.n_positions, cfg.d_model)

    def norm(path: tuple, width: int) -> None:
        shapes[*path, "scale"] = (width,)
        if cfg.norm == "layer":
            shapes[*path, "bias"] = (width,)

    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    linears = {"q": (cfg.d_model, heads), "k": (cfg.d_model, kv_heads)}
    linears |= {"v": (cfg.d_model, kv_heads), "o": (heads, cfg.d_model)}
    linears |= {"gate": (cfg.d_model, cfg.d_mlp)} if cfg.gated else {}
    linears |= {"up": (cfg.d_model, cfg.d_mlp), "down": (cfg.d_mlp, cfg.d_model)}
    for i in range(cfg.n_layers):
        at = ("layers", i)
        for name, shape in linears.items():
            shapes[*at, name, "kernel"] = shape
            if name in cfg.biases:
                shapes[*at, name, "bias"] = shape[1:]
        for name in ("ln_1", "ln_2", *(("post_attn", "post_mlp") if cfg.post_norms else ())):
            norm((*at, name), cfg.d_model)
        for name in ("q_norm", "k_norm") if cfg.qk_norm else ():
            norm((*at, name), cfg.d_head)
    norm(("final",), cfg.d_model)
    return shapes if cfg.tied else shapes | {("head",): (cfg.d_model, cfg.vocab_size)}


def apply(
    params: Params,
    cfg: Config,
    tokens_BT: jax.Array,
    tap: Tap = identity_tap,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Next-token logits.

    A token sees itself and earlier ones only, so padding on the right changes nothing before it.

    Args:
      params: tree with the leaves of `leaf_shapes`, of any floating type.
      cfg: the model.
      tokens_BT: integer [B, T], T at most n_positions.
      tap: called as tap(site, x) at every site of `sites.site_widths`, with x of [B, T, width];
        what it returns takes the place of x.
      dtype: type of the matrix products and of what flows. Norms, scores and logits have at least
        float32.

    Returns:
      [B, T, V], float32, or float64 if dtype is.

    Raises:
      ValueError: T is above n_positions.
    """
    length = tokens_BT.shape[1]
    if length > cfg.n_positions:
        raise ValueError(
            f"a context of {length} tokens is longer than the model's {cfg.n_positions} positions"
        )
    wide = jnp.promote_types(dtype, jnp.float32)
    x_BTD = jnp.asarray(params["embed"])[tokens_BT].astype(dtype)
    if cfg.embed_scale != 1.0:
        x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, dtype)
    if cfg.learned_positions:
        x_BTD = x_BTD + params["pos"][None, :length].astype(dtype)
    x_BTD = tap("embed", x_BTD)
    rotations = {rope: rope.rotation(length, wide) for rope in set(cfg.ropes)}
    for i, layer in enumerate(params["layers"]):
        rotation = rotations[cfg.ropes[i]] if cfg.ropes else None
        x_BTD = _block(layer, cfg, i, x_BTD, rotation, tap)
    x_BTD = tap("final", _norm(x_BTD, params["final"], cfg))
    head_DV = params["embed"].T if cfg.tied else params["head"]
    logits = jnp.matmul(x_BTD, head_DV.astype(dtype), preferred_element_type=wide)
    return _capped(logits, cfg.logit_cap)


def _block(layer: Params, cfg: Config, i: int, x_BTD: jax.Array, rotation, tap: Tap) -> jax.Array:
    x_BTD = tap(f"{i}.resid_pre", x_BTD)
    normed_BTD = _norm(x_BTD, layer["ln_1"], cfg)
    z_BTZ = tap(f"{i}.attn_z", _attention(layer, cfg, i, normed_BTD, rotation))
    attn_BTD = _linear(z_BTZ, layer["o"])
    if cfg.post_norms:
        attn_BTD = _norm(attn_BTD, layer["post_attn"], cfg)
    attn_BTD = tap(f"{i}.attn_out", attn_BTD)
    if cfg.parallel:
        mlp_BTD = tap(f"{i}.mlp_out", _mlp(layer, cfg, i, x_BTD, tap))
        return tap(f"{i}.resid_post", mlp_BTD + attn_BTD + x_BTD)
    x_BTD = tap(f"{i}.resid_mid", x_BTD + attn_BTD)
    mlp_BTD = tap(f"{i}.mlp_out", _mlp(layer, cfg, i, x_BTD, tap))
    return tap(f"{i}.resid_post", x_BTD + mlp_BTD)


def _mlp(layer: Params, cfg: Config, i: int, x_BTD: jax.Array, tap: Tap) -> jax.Array:
    x_BTD = _norm(x_BTD, layer["ln_2"], cfg)
    act = ACTIVATIONS[cfg.activation]
    if cfg.gated:
        hidden_BTF = act(_linear(x_BTD, layer["gate"])) * _linear(x_BTD, layer["up"])
    else:
        hidden_BTF = act(_linear(x_BTD, layer["up"]))
    out_BTD = _linear(tap(f"{i}.mlp_hidden", hidden_BTF), layer["down"])
    return _norm(out_BTD, layer["post_mlp"], cfg) if cfg.post_norms else out_BTD


def _attention(layer: Params, cfg: Config, i: int, x_BTD: jax.Array, rotation) -> jax.Array:
    """What the heads read, [B, T, H * K]."""
    batch, length, _ = x_BTD.shape
    q, k, v = (_linear(x_BTD, layer[n]).reshape(batch, length, -1, cfg.d_head) for n in "qkv")
    if cfg.qk_norm:
        q, k = _norm(q, layer["q_norm"], cfg), _norm(k, layer["k_norm"], cfg)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    q_BTGRK = q.reshape(batch, length, cfg.n_kv_heads, -1, cfg.d_head)
    window = cfg.windows[i] if cfg.windows else None
    parts = []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(length, start + _QUERY_BLOCK)
        first = 0 if window is None else max(0, start - window + 1)
        seen = _visible(start, stop, first, window)
        parts.append(_attend(cfg, q_BTGRK[:, start:stop], k[:, first:stop], v[:, first:stop], seen))
    z = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return z.reshape(batch, length, -1)


def _visible(start: int, stop: int, first: int, window: int | None) -> jax.Array:
    """bool [queries, keys]: whether query start + t sees key first + s."""
    behind_TS = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None]
    seen_TS = behind_TS >= 0
    return seen_TS if window is None else seen_TS & (behind_TS < window)


def _attend(cfg: Config, q_BTGRK, k_BSGK, v_BSGK, seen_TS: jax.Array) -> jax.Array:
    """Softmax attention of groups of R query heads that share a key and value head."""
    wide = jnp.promote_types(q_BTGRK.dtype, jnp.float32)
    scale = cfg.d_head**-0.5 if cfg.attention_scale is None else cfg.attention_scale
    score = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide)
    score = _capped(score * jnp.asarray(scale, wide), cfg.attention_cap)
    score = jnp.where(seen_TS[None, None, None], score, jnp.finfo(wide).min)
    weight = jax.nn.softmax(score, axis=-1).astype(v_BSGK.dtype)
    return jnp.einsum("BGRTS,BSGK->BTGRK", weight, v_BSGK)


def _capped(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else jnp.tanh(x / cap) * cap


def _linear(x: jax.Array, p: Params) -> jax.Array:
    y = x @ p["kernel"].astype(x.dtype)
    return y + jnp.broadcast_to(p["bias"].astype(x.dtype), y.shape) if "bias" in p else y


def _norm(x: jax.Array, p: Params, cfg: Config) -> jax.Array:
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if cfg.norm == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + cfg.epsilon)
    scale = p["scale"].astype(y.dtype) + (1.0 if cfg.scale_plus_one else 0.0)
    y = y * jnp.broadcast_to(scale, y.shape)
    if "bias" in p:
        y = y + jnp.broadcast_to(p["bias"].astype(y.dtype), y.shape)
    return y.astype(x.dtype)
