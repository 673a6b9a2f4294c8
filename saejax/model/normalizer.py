"""Input normalisation: one object, saved with the model, applied in encode and undone in decode."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["unit", "layer_norm", "scalar", "none"]
KINDS = ("unit", "layer_norm", "scalar", "none")

# The released GPT-2 autoencoders add this to the standard deviation when encoding and leave it
# out when decoding; 'layer_norm' reproduces both.
_LAYER_NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Maps activations to the space the autoencoder works in, and back.

    Attributes:
      kind: 'unit': subtract the vector's own mean over d_model, divide by the norm of what is left
        (Gao et al. 2024, sec. 2.1). 'layer_norm': subtract the mean, divide by the unbiased
        standard deviation + 1e-5, as in the released checkpoints; norms become sqrt(d - 1).
        'scalar': divide by one number measured on the training data so that E||x||^2 = 1.
        'none': leave as is.
      scale: the number 'scalar' divides by; 1 for the other kinds.
    """

    kind: Kind = "unit"
    scale: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"normalization = {self.kind!r} must be one of {KINDS}")
        if not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale = {self.scale} must be positive and finite")

    def apply(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normalises activations.

        Args:
          x: `[..., D]` raw activations, any floating dtype.

        Returns:
          x_n `[..., D]` (float32, or float64 for float64 input), and the offset and scale
          `[..., 1]` that `undo` needs.
        """
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        one = jnp.ones((*x.shape[:-1], 1), x.dtype)
        if self.kind in ("none", "scalar"):
            return x / self.scale, jnp.zeros_like(one), one * self.scale
        offset = x.mean(-1, keepdims=True)
        centred = x - offset
        if self.kind == "unit":
            square = jnp.square(centred).sum(-1, keepdims=True)
            # A constant vector has nothing left to scale but the rounding of its mean: it maps to
            # zero instead of NaN or noise, and has a gradient of zero.
            rounding = x.shape[-1] * jnp.square(4 * jnp.finfo(x.dtype).eps * offset)
            constant = square <= rounding
            scale = jnp.where(constant, one, jnp.sqrt(jnp.where(constant, one, square)))
            return jnp.where(constant, 0, centred / scale), offset, scale
        square = jnp.square(centred).sum(-1, keepdims=True) / (x.shape[-1] - 1)
        std = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, one)), 0)
        return centred / (std + _LAYER_NORM_EPSILON), offset, std

    def undo(self, x_n: jax.Array, offset: jax.Array, scale: jax.Array) -> jax.Array:
        """Returns normalised vectors `[..., D]` to the space of the input."""
        return x_n * scale + offset


def measure(kind: Kind, rows: np.ndarray) -> Normalizer:
    """The normaliser of `kind` for data of which `rows` `[N, D]` are a sample.

    Raises:
      ValueError: the sample has no finite positive norm ('scalar').
    """
    if kind != "scalar":
        return Normalizer(kind=kind)
    mean_square = np.square(np.asarray(rows, np.float64)).sum(-1).mean()
    return Normalizer(kind=kind, scale=float(np.sqrt(mean_square)))
