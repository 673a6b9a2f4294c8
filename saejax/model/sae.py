"""The TopK autoencoder as a module, for notebooks, evaluation and export."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax.model import sharded, sparse
from saejax.model.normalizer import KINDS, Kind, Normalizer
from saejax.types import Latents, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Shape and recipe of the autoencoder (Gao et al. 2024, sec. 2 and App. A.1).

    Attributes:
      d_model: width D of the activations.
      n_latents: number of latents L.
      k: latents kept per token.
      normalization: 'unit', 'layer_norm', 'scalar' or 'none'; see `Normalizer`.
      relu: apply ReLU to the k survivors.
      parallel_init: encoder rows start parallel to decoder rows.
      match_encoder_scale: scale the encoder so that reconstructions start at their input's norm.
      pre_bias_init: 'geometric_median', 'mean' or 'zeros' of a sample of the data.
      latent_bias: train a bias per latent; otherwise it stays zero.
      compute_dtype: of the multiplications; 'auto' is bfloat16 on accelerators, float32 on CPU.
        Parameters are float32, selection and sums float32, always.
    """

    d_model: int
    n_latents: int
    k: int
    normalization: Kind = "unit"
    relu: bool = True
    parallel_init: bool = True
    match_encoder_scale: bool = True
    pre_bias_init: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    latent_bias: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self):
        for field in ("d_model", "n_latents", "k"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)} must be at least 1")
        if self.k > self.n_latents:
            raise ValueError(
                f"k = {self.k} must not exceed n_latents = {self.n_latents}; "
                f"lower k or raise n_latents"
            )
        _check_choice("normalization", self.normalization, KINDS)
        _check_choice("pre_bias_init", self.pre_bias_init, ("geometric_median", "mean", "zeros"))
        _check_choice("compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))

    @property
    def dtype(self) -> jnp.dtype:
        """The multiplication dtype, with 'auto' resolved for the default backend."""
        return self.dtype_on(jax.default_backend())

    def dtype_on(self, platform: str) -> jnp.dtype:
        """The multiplication dtype on devices of this platform."""
        if self.compute_dtype != "auto":
            return jnp.dtype(self.compute_dtype)
        return jnp.dtype("float32" if platform == "cpu" else "bfloat16")

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by name."""
        matrix = (self.n_latents, self.d_model)
        return {
            "w_enc": matrix,
            "w_dec": matrix,
            "latent_bias": (self.n_latents,),
            "pre_bias": (self.d_model,),
        }


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} = {value!r} must be one of {allowed}")


# As a whole: called outside jit, each of their operations would be a program of its own.
_encode_top_k = jax.jit(sparse.encode_top_k, static_argnums=(4, 5))
_decode = jax.jit(sparse.decode, static_argnums=(3,))


class SAE(nnx.Module):
    """A k-sparse autoencoder: `decode(encode(x))` in the space of the raw activations.

    Attributes:
      config: its `SAEConfig`.
      normalizer: the input normalisation, applied by `encode` and undone by `decode`.
      w_enc, w_dec: `[L, D]` float32; decoder rows have unit norm.
      latent_bias: `[L]`; pre_bias: `[D]`.
      mesh: what the latents are split over; None where one device holds all of them.
    """

    def __init__(
        self,
        config: SAEConfig,
        params: Params,
        normalizer: Normalizer,
        mesh: Mesh | None = None,
    ):
        """Owns `params`, which are laid out on `mesh` if one is given.

        Raises:
          ValueError: a parameter is missing or has another shape than `config` says.
        """
        check_params(config, params)
        self.config = config
        self.normalizer = normalizer
        several = mesh is not None and mesh_lib.shape_of(mesh).latent > 1
        self.mesh = mesh if several else None
        self.w_enc = nnx.Param(params["w_enc"])
        self.w_dec = nnx.Param(params["w_dec"])
        self.latent_bias = nnx.Param(params["latent_bias"])
        self.pre_bias = nnx.Param(params["pre_bias"])

    @property
    def params(self) -> Params:
        """The four arrays by name."""
        names = ("w_enc", "w_dec", "latent_bias", "pre_bias")
        return {name: getattr(self, name)[...] for name in names}

    def encode(self, x: jax.Array) -> Latents:
        """The k strongest latents of raw activations `[..., D]`.

        Raises:
          ValueError: the last dimension is not d_model.
        """
        x_n, offset, scale = self.normalizer.apply(self._check_width(x))
        flat_BD = x_n.reshape(math.prod(x_n.shape[:-1]), self.config.d_model)
        values, indices = self._top_k(flat_BD)
        shape = (*x_n.shape[:-1], self.config.k)
        if self.config.relu:
            values = jax.nn.relu(values)
        return Latents(
            values=values.reshape(shape),
            indices=indices.reshape(shape),
            offset=offset,
            scale=scale,
        )

    def _top_k(self, x_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        k, dtype = self.config.k, self.config.dtype
        if self.mesh is not None:
            return sharded.encode_top_k(x_BD, self.params, k, dtype, self.mesh)
        return _encode_top_k(
            x_BD, self.w_enc[...], self.latent_bias[...], self.pre_bias[...], k, dtype
        )

    def decode(self, latents: Latents) -> jax.Array:
        """Reconstructs raw activations `[..., D]` from a code `[..., K]` (any K).

        Indices must lie in [0, n_latents).
        """
        values, indices = latents.values, latents.indices
        n, k = math.prod(values.shape[:-1]), values.shape[-1]
        code = (values.reshape(n, k), indices.reshape(n, k), self.w_dec[...], self.config.dtype)
        out_BD = _decode(*code) if self.mesh is None else sharded.decode(*code, self.mesh)
        x_n = out_BD.reshape(*values.shape[:-1], self.config.d_model) + self.pre_bias[...]
        return self.normalizer.undo(x_n, latents.offset, latents.scale)

    def pre_activations(self, x: jax.Array) -> jax.Array:
        """Dense pre-activations `[..., L]` of raw activations `[..., D]`; memory grows with L."""
        x_n, _, _ = self.normalizer.apply(self._check_width(x))
        h_BL = sparse.pre_activations(
            x_n.reshape(math.prod(x_n.shape[:-1]), self.config.d_model),
            self.w_enc[...],
            self.latent_bias[...],
            self.pre_bias[...],
            self.config.dtype,
        )
        return h_BL.reshape(*x_n.shape[:-1], self.config.n_latents)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The reconstruction of raw activations `[..., D]`."""
        return self.decode(self.encode(x))

    def _check_width(self, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"activations of shape {x.shape} do not end in d_model = {self.config.d_model}; "
                f"this autoencoder reads vectors of that width only"
            )
        return x


def check_params(config: SAEConfig, params: Params) -> None:
    """Raises ValueError naming every parameter that is missing, unknown or of another shape."""
    expected = config.param_shapes()
    wrong = [
        f"{name}: expected {expected.get(name, 'nothing')}, got "
        f"{tuple(params[name].shape) if name in params else 'nothing'}"
        for name in sorted(expected | params)
        if name not in params or expected.get(name) != tuple(params[name].shape)
    ]
    if wrong:
        raise ValueError("parameters do not fit the configuration: " + "; ".join(wrong))
