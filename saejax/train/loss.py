"""The loss, term by term, as local functions of one shard's parameters and a block of tokens.

With e = x - x_hat, all in the normalised space (Gao et al. 2024, sec. 2, 5.3 and App. A):

    L = [ sum ||e(k)||^2 + c_multi * sum ||e(4k)||^2 ] / (B * variance)  +  alpha * L_aux
    L_aux = sum ||e - e_hat||^2 / sum ||e - mean(e)||^2

where e is detached in L_aux and e_hat = W_dec z_aux, z_aux the k_aux strongest dead latents (no
pre_bias: e has none). `variance` is a constant of the dataset; L_aux is normalised per batch,
because e shrinks as training goes on. L_aux is 0 when nothing is dead, and replaced by 0 when it
is not finite.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from saejax import collectives
from saejax.model import sparse
from saejax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms.

    Attributes:
      auxk_coefficient: alpha, weight of the AuxK loss; 0 turns it off.
      k_aux: dead latents that model the residual per token; None is the power of two nearest
        d_model / 2, at most n_latents.
      dead_tokens: a latent is dead once it has not fired for this many tokens.
      multi_topk_coefficient: weight of the reconstruction from the multi_topk_factor * k
        strongest latents (1/8 in the paper); 0 turns it off.
      multi_topk_factor: see above (4 in the paper).
    """

    auxk_coefficient: float = 1 / 32
    k_aux: int | None = None
    dead_tokens: int = 10_000_000
    multi_topk_coefficient: float = 0.0
    multi_topk_factor: int = 4

    def __post_init__(self):
        for field in ("auxk_coefficient", "multi_topk_coefficient"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field} = {value} must be finite and at least 0 (0 = off)")
        if self.k_aux is not None and self.k_aux < 1:
            raise ValueError(f"k_aux = {self.k_aux} must be at least 1, or None for d_model / 2")
        if not 1 <= self.dead_tokens <= 2**30:
            raise ValueError(f"dead_tokens = {self.dead_tokens} must lie in [1, 2**30]")
        if self.multi_topk_factor < 2:
            raise ValueError(f"multi_topk_factor = {self.multi_topk_factor} must be at least 2")

    def resolve_k_aux(self, d_model: int, n_latents: int) -> int:
        """`k_aux`, or the power of two nearest d_model / 2 (on a log scale), at most n_latents."""
        if self.k_aux is not None:
            return self.k_aux
        return min(2 ** round(math.log2(max(d_model / 2, 1))), n_latents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What the loss functions need to know of the configuration; static under jit.

    Attributes:
      k: latents kept per token; k_aux, k_multi: see `LossConfig` (k_multi is 0 when off).
      multi_coefficient: weight of the k_multi reconstruction.
      auxk_coefficient: weight of the AuxK loss.
      dead_tokens: see `LossConfig`.
      relu: ReLU after TopK.
      dtype: of the multiplications.
    """

    k: int
    k_aux: int
    k_multi: int
    multi_coefficient: float
    auxk_coefficient: float
    dead_tokens: int
    relu: bool
    dtype: jnp.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What the reconstruction loss leaves behind: residual `[B, D]` and sums of the block.

    `fired` `[L]` counts, per latent of this shard, the tokens it was active on; `active` their sum.
    """

    residual: jax.Array
    squared_error: jax.Array
    multi_squared_error: jax.Array
    fired: jax.Array
    active: jax.Array


def _survivors(values_BC, indices_BC, k: int, relu: bool):
    """This shard's part of the global top k: values (0 where not kept) and indices."""
    n = min(k, values_BC.shape[1])
    values_BK, indices_BK = values_BC[:, :n], indices_BC[:, :n]
    kept_BK = collectives.keep_global_top_k(jax.lax.stop_gradient(values_BK), k)
    values_BK = jnp.where(kept_BK, values_BK, 0)
    return (jax.nn.relu(values_BK) if relu else values_BK), indices_BK


def reconstruction_loss(
    params: Params, x_BD: jax.Array, spec: LossSpec
) -> tuple[jax.Array, Reconstruction]:
    """Squared error of a block of tokens, Multi-TopK included, not yet divided by anything.

    Args:
      params: this latent shard's parameters (pre_bias whole).
      x_BD: normalised tokens of this data row.
      spec: static settings.

    Returns:
      The same scalar on every latent shard, and the `Reconstruction`.
    """
    n_latents = params["w_enc"].shape[0]
    candidates = min(max(spec.k, spec.k_multi), n_latents)
    pre_bias_shared = collectives.share_over_latents(params["pre_bias"])
    values_BC, indices_BC = sparse.encode_top_k(
        x_BD, params["w_enc"], params["latent_bias"], pre_bias_shared, candidates, spec.dtype
    )

    def error(k):
        z_BK, indices_BK = _survivors(values_BC, indices_BC, k, spec.relu)
        partial_BD = sparse.decode(z_BK, indices_BK, params["w_dec"], spec.dtype)
        x_hat_BD = collectives.sum_over_latents(partial_BD) + params["pre_bias"]
        return x_BD - x_hat_BD, z_BK, indices_BK

    e_BD, z_BK, indices_BK = error(spec.k)
    squared_error = jnp.square(e_BD).sum()
    multi = jnp.zeros_like(squared_error)
    if spec.multi_coefficient:
        multi = jnp.square(error(spec.k_multi)[0]).sum()
    active_BK = (z_BK != 0).astype(jnp.int32)
    fired_L = jnp.zeros(n_latents, jnp.int32).at[indices_BK].add(active_BK)
    return squared_error + spec.multi_coefficient * multi, Reconstruction(
        residual=jax.lax.stop_gradient(e_BD),
        squared_error=squared_error,
        multi_squared_error=multi,
        fired=fired_L,
        active=active_BK.sum(),
    )


def auxk_error(
    dead: Params, alive_C: jax.Array, x_BD: jax.Array, e_BD: jax.Array, spec: LossSpec
) -> jax.Array:
    """`sum ||e - e_hat||^2` of a block, e_hat from the k_aux strongest dead latents per token.

    The dead latents were gathered into a dense block first, so that nothing here grows with the
    number of latents.

    Args:
      dead: parameters of C latents, all dead ones of this shard among them, and pre_bias.
      alive_C: True where row C is padding.
      x_BD: normalised tokens; e_BD: their residuals, a constant.
      spec: static settings.

    Returns:
      The same scalar on every latent shard.
    """
    pre_bias_shared = collectives.share_over_latents(dead["pre_bias"])
    h_BC = sparse.pre_activations(
        x_BD, dead["w_enc"], dead["latent_bias"], pre_bias_shared, spec.dtype
    )
    h_BC = jnp.where(alive_C, -jnp.inf, h_BC)
    kept_BC = _keep_dead(jax.lax.stop_gradient(h_BC), spec.k_aux)
    # Zero the rest before ReLU: the gradient of a masked -inf would be NaN.
    z_BC = jnp.where(kept_BC, h_BC, 0)
    z_BC = jax.nn.relu(z_BC) if spec.relu else z_BC
    accumulate = jnp.promote_types(spec.dtype, jnp.float32)
    partial_BD = jax.lax.dot_general(
        z_BC.astype(spec.dtype),
        dead["w_dec"].astype(spec.dtype),
        (((1,), (0,)), ((), ())),
        precision=sparse.PRECISION,
        preferred_element_type=accumulate,
    )
    return jnp.square(e_BD - collectives.sum_over_latents(partial_BD)).sum()


def _keep_dead(h_BC: jax.Array, k_aux: int) -> jax.Array:
    """Which pre-activations are among the k_aux largest of all shards; -inf never is."""
    eligible_BC = h_BC != -jnp.inf
    if collectives.latent_shards() * h_BC.shape[1] <= k_aux:
        return eligible_BC
    values_BK, indices_BK = sparse.top_k(h_BC, min(k_aux, h_BC.shape[1]))
    kept_BK = collectives.keep_global_top_k(values_BK, k_aux)
    rows_B1 = jnp.arange(h_BC.shape[0])[:, None]
    return eligible_BC & jnp.zeros(h_BC.shape, bool).at[rows_B1, indices_BK].set(kept_BK)
