"""Rotary position embeddings: the kinds that are implemented, from config.json to angles.

Su et al. 2021; halves are rotated against each other, as in the `transformers` library. Scalings:
'linear' (all frequencies divided by a factor) and 'llama3' (Llama 3.1: long waves divided, short
ones kept, those between interpolated). Another kind is refused: to ignore it runs silently wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotary embedding.

    Attributes:
      dims: leading dimensions of a head that are rotated; even.
      theta: base of the wavelengths.
      kind: one of `KINDS`.
      factor: of the scaling; frequencies of long waves are divided by it.
      low_freq_factor, high_freq_factor, original_context: of 'llama3'; waves longer than
        original_context / low are divided, those shorter than original_context / high kept.
    """

    dims: int
    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        if self.dims < 2 or self.dims % 2:
            raise ValueError(f"RoPE: {self.dims} rotated dimensions of a head, must be even")
        if not (self.theta > 0 and self.factor > 0):
            raise ValueError(
                f"RoPE: rope_theta = {self.theta} and factor = {self.factor} must be positive"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"RoPE: low_freq_factor = {self.low_freq_factor} must be positive and below "
                f"high_freq_factor = {self.high_freq_factor}"
            )

    def frequencies(self) -> np.ndarray:
        """Radians per position of each rotated pair, float64 [dims / 2]."""
        freq = float(self.theta) ** (-np.arange(0, self.dims, 2) / self.dims)
        if self.kind == "linear":
            return freq / self.factor
        if self.kind == "llama3":
            turns = self.original_context * freq / (2 * math.pi)  # within the original context
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            return freq * (kept + (1 - kept) / self.factor)
        return freq

    def rotation(self, length: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine of every angle, both [1, length, 1, dims / 2]."""
        positions = jnp.arange(length, dtype=dtype)
        angle = positions[:, None] * jnp.asarray(self.frequencies(), dtype)[None]
        return jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]


def rotate(x_BTHK: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the leading dimensions of every head; computed in the type of the rotation."""
    cos, sin = rotation
    half = cos.shape[-1]
    first, second = x_BTHK[..., :half], x_BTHK[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(t.astype(x_BTHK.dtype) for t in turned), x_BTHK[..., 2 * half :]], -1)


def read_rope(
    parameters: Mapping[str, Any] | None, *, dims: int, theta: float | None, max_positions: int
) -> Rope:
    """A Rope from `rope_parameters` (transformers 5) or `rope_scaling` (older files).

    Args:
      parameters: that object of config.json, or None.
      dims: rotated dimensions.
      theta: base, unless the parameters name it; None where they must.
      max_positions: the model's, which stand in for a missing original context.

    Raises:
      ValueError: a rope_type that is not implemented, or a field is missing.
    """
    p = dict(parameters or {})
    kind = p.get("rope_type", p.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(
            f"config.json: rope_type = {kind!r} is not implemented; supported: {', '.join(KINDS)}"
        )
    needed = {"default": (), "linear": ("factor",)}
    needed["llama3"] = ("factor", "low_freq_factor", "high_freq_factor")
    if missing := [name for name in needed[kind] if p.get(name) is None]:
        raise ValueError(f"config.json: rope_type = {kind!r} needs {', '.join(missing)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *needed["llama3"]}
    known |= {"original_max_position_embeddings"}
    if unknown := sorted(name for name in set(p) - known if p[name] is not None):
        raise ValueError(
            f"config.json: {', '.join(unknown)} of rope_type = {kind!r} is not implemented"
        )
    given = {name: _number(p, name, None) for name in needed[kind]}
    if kind == "llama3":
        original = _number(p, "original_max_position_embeddings", max_positions)
        given["original_context"] = int(original)
    base = _number(p, "rope_theta", theta)
    if base is None:
        raise ValueError("config.json: the base of RoPE (rope_theta) is null; give a number")
    return Rope(dims=dims, theta=base, kind=kind, **given)


def _number(parameters: Mapping[str, Any], name: str, default: float | None) -> float | None:
    value = parameters.get(name)
    value = default if value is None else value
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {name} = {value!r} of RoPE, a positive number is needed")
    return float(value)
