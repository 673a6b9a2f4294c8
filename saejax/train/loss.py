"""The loss, term by term, with its gradients, on the shards of one device.

With e = x - x_hat, all in the normalised space (Gao et al. 2024, sec. 2, 5.3 and App. A):

    L = [ sum ||e(k)||^2 + c_multi * sum ||e(4k)||^2 ] / (B * variance)  +  alpha * L_aux
    L_aux = sum ||e - e_hat||^2 / sum ||e - mean(e)||^2

where e is detached in L_aux and e_hat = W_dec z_aux, z_aux the k_aux strongest dead latents (no
pre_bias: e has none). `variance` is a constant of the dataset; L_aux is normalised per batch,
because e shrinks as training goes on. L_aux is 0 when nothing is dead, and replaced by 0 when it
is not finite.

Gradients are taken by hand: every term is a sparse reconstruction of some target, and what it adds
to the gradients is two sparse outer products, put straight into the sums that the step carries. So
no gradient of the size of the weights exists per microbatch. The gradient of pre_bias through the
encoder is W_enc^T times that of the latent bias, taken once a step.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from saejax import collectives
from saejax.model import sparse
from saejax.model.codes import Code, DenseCode, Error, make_code
from saejax.model.sparse import WeightGrads
from saejax.types import Params

COUNTER_LIMIT = 2**30
"""Tokens since a latent fired are counted up to here."""


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
        if not 1 <= self.dead_tokens <= COUNTER_LIMIT:
            raise ValueError(f"dead_tokens = {self.dead_tokens} must lie in [1, 2**30]")
        if self.multi_topk_factor < 2:
            raise ValueError(f"multi_topk_factor = {self.multi_topk_factor} must be at least 2")

    def resolve_k_aux(self, d_model: int, n_latents: int) -> int:
        """`k_aux`, or the power of two nearest d_model / 2 (on a log scale), at most n_latents."""
        if self.k_aux is not None:
            return self.k_aux
        return min(2 ** round(math.log2(max(d_model / 2, 1))), n_latents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """One global top-k.

    Attributes:
      k: latents kept per token over all shards.
      capacity: candidates that each shard offers at most.
    """

    k: int
    capacity: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What the loss functions need to know of the configuration; static under jit.

    Attributes:
      main, multi, aux: the selections of the reconstruction, of Multi-TopK (None when off) and of
        AuxK.
      multi_coefficient: weight of the Multi-TopK reconstruction.
      auxk_coefficient: weight of the AuxK loss.
      dead_tokens: see `LossConfig`.
      relu: ReLU after TopK.
      dtype: of the multiplications.
      exchange: see `TopKConfig`.
      dense_below: see `sparse.dense_below`.
      gather_codes: gather codes, inputs and residuals over 'data', so that every replica makes the
        whole weight gradient, rather than summing gradients over 'data'.
    """

    main: Selection
    multi: Selection | None
    aux: Selection
    multi_coefficient: float
    auxk_coefficient: float
    dead_tokens: int
    relu: bool
    dtype: jnp.dtype
    exchange: str = "all_to_all"
    dense_below: int = 0
    gather_codes: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What the reconstruction of a block of tokens leaves behind.

    Attributes:
      residual: `[b, D]`, of this device's own rows, in the compute dtype.
      squared_error, multi_squared_error: sums over its own rows.
      fired: `[L]` bool, latents of this shard active on any token of the block.
      active: (token, latent) pairs of this shard that are active.
      cut, multi_cut: tokens on which this shard offered all it may and had more.
      reselected: tokens that a kernel had to select again; see `topk_encode`.
    """

    residual: jax.Array
    squared_error: jax.Array
    multi_squared_error: jax.Array
    fired: jax.Array
    active: jax.Array
    cut: jax.Array
    multi_cut: jax.Array
    reselected: jax.Array


def select(
    centred_BD: jax.Array,
    w_enc_LD: jax.Array,
    latent_bias_L: jax.Array,
    wanted: Selection,
    spec: LossSpec,
) -> tuple[Code, jax.Array]:
    """This shard's part of a global top-k.

    Args:
      centred_BD: the encoder's input.
      w_enc_LD, latent_bias_L: of this shard; a latent whose bias is -inf is never kept.
      wanted: how many, and how many this shard may offer.
      spec: static settings.

    Returns:
      The code, and on how many tokens this shard was at capacity: it offered all it may, all were
      kept, and it had more. Where no shard was, the selection is the exact one.
    """
    n_latents = len(w_enc_LD)
    shards = collectives.latent_shards()
    whole = shards * n_latents <= wanted.k
    exact = wanted.capacity >= min(wanted.k, n_latents)
    if whole or (shards == 1 and exact):
        # AuxK keeps hundreds per token: gathering as many rows would cost more than products do.
        h_BL = sparse.of_centred(centred_BD, w_enc_LD, latent_bias_L)
        kept_BL = h_BL != -jnp.inf
        if not whole:
            kept_BL &= sparse.top_k_mask(h_BL, wanted.k)
        on_BL = kept_BL & ~(h_BL <= 0) if spec.relu else kept_BL
        return DenseCode(jnp.where(on_BL, h_BL, 0), on_BL), jnp.zeros((), jnp.int32)
    offered = min(wanted.capacity, n_latents)
    # Where most latents are masked, groups of them say nothing: a kernel would select all again.
    values, indices, _ = sparse.topk_encode(
        centred_BD, w_enc_LD, latent_bias_L, offered, implementation="xla"
    )
    n_eligible = (latent_bias_L != -jnp.inf).sum(dtype=jnp.int32)
    return _keep(values, indices, wanted, n_latents, n_eligible, spec)


def _keep(values_BC, indices_BC, wanted: Selection, n_latents: int, n_eligible, spec: LossSpec):
    """`select` from candidates, of which the first `wanted.capacity` count."""
    capacity = min(wanted.capacity, values_BC.shape[1])
    values_BC, indices_BC = values_BC[:, :capacity], indices_BC[:, :capacity]
    count_B = collectives.count_kept(values_BC, wanted.k, spec.exchange)
    cut = jnp.zeros((), jnp.int32)
    if capacity < min(wanted.k, n_latents):
        cut = ((count_B == capacity) & (n_eligible > capacity)).sum(dtype=jnp.int32)
    code = make_code(
        values_BC,
        indices_BC,
        count_B,
        n_latents,
        shards=collectives.latent_shards(),
        k=wanted.k,
        relu=spec.relu,
        dense_below=spec.dense_below,
    )
    return code, cut


def add_gradients(
    total: Params,
    code: Code,
    error: Error,
    centred_BD: jax.Array,
    factor: jax.Array,
    *,
    gather_codes: bool,
) -> Params:
    """Adds the gradients of `-factor / 2 * sum ||e||^2` in both matrices and the latent bias.

    Args:
      total: what to add to.
      code: the code that reconstructed the target.
      error: what it left.
      centred_BD: the encoder's input.
      factor: derivative of the loss with respect to the reconstruction, per unit of e.
      gather_codes: see `LossSpec`.
    """

    def add(totals, part):
        code, inner, e_BD, centred_BD = part
        return code.add_weight_gradients(
            totals, factor * code.values, factor * inner, e_BD, centred_BD
        )

    totals = WeightGrads(total["w_dec"], total["w_enc"], total["latent_bias"])
    part = (code, error.inner, error.all_BD, centred_BD)
    if gather_codes:
        parts = collectives.gather_over_data(part)
        totals, _ = jax.lax.scan(lambda totals, part: (add(totals, part), None), totals, parts)
    else:
        totals = add(totals, part)
    w_dec_LD, w_enc_LD, latent_bias_L = totals
    return total | {"w_dec": w_dec_LD, "w_enc": w_enc_LD, "latent_bias": latent_bias_L}


def add_reconstruction(
    total: Params, weights: Params, x_bD: jax.Array, scale: jax.Array, spec: LossSpec
) -> tuple[Params, Reconstruction]:
    """Reconstructs a block of tokens, Multi-TopK included, and adds its gradients to `total`.

    Args:
      total: gradients so far; pre_bias holds the decoder's part, of this device's own rows.
      weights: this latent shard's matrices in the compute dtype, and the biases.
      x_bD: normalised tokens, this device's own rows.
      scale: factor of the squared error in the loss.
      spec: static settings.
    """
    centred_bD = x_bD - weights["pre_bias"]
    centred_BD = collectives.gather_tokens(centred_bD, spec.dtype)
    n_latents = len(weights["w_enc"])
    offered = max(s.capacity for s in (spec.main, spec.multi) if s is not None)
    values_BC, indices_BC, reselected = sparse.topk_encode(
        centred_BD, weights["w_enc"], weights["latent_bias"], min(offered, n_latents)
    )

    def term(total, wanted: Selection, coefficient: float):
        code, cut = _keep(values_BC, indices_BC, wanted, n_latents, n_latents, spec)
        error = code.reconstruct(centred_bD, weights["w_dec"], spec.dtype)
        factor = -2 * coefficient * scale
        total = add_gradients(
            total, code, error, centred_BD, factor, gather_codes=spec.gather_codes
        )
        own_D = error.own_bD.sum(0, dtype=total["pre_bias"].dtype)
        return total | {"pre_bias": total["pre_bias"] + factor * own_D}, code, error, cut

    total, code, error, cut = term(total, spec.main, 1.0)
    multi, multi_cut = jnp.zeros_like(error.squared), jnp.zeros((), jnp.int32)
    if spec.multi is not None:
        with jax.named_scope("multi"):
            total, _, wide, multi_cut = term(total, spec.multi, spec.multi_coefficient)
            multi = wide.squared
    on = (code.values != 0).astype(jnp.int32)
    return total, Reconstruction(
        residual=error.own_bD,
        squared_error=error.squared,
        multi_squared_error=multi,
        fired=code.add_to_latents(jnp.zeros(n_latents, jnp.int32), on) > 0,
        active=on.sum(dtype=jnp.int32),
        cut=cut,
        multi_cut=multi_cut,
        reselected=reselected,
    )


def add_auxk(
    total: Params,
    dead: Params,
    alive_C: jax.Array,
    x_bD: jax.Array,
    e_bD: jax.Array,
    scale: jax.Array,
    spec: LossSpec,
) -> tuple[Params, jax.Array, jax.Array]:
    """Reconstructs the residuals of a block from dead latents and adds the gradients to `total`.

    The dead latents were gathered into a block of C rows first, so that nothing here grows with
    the number of latents.

    Args:
      total: gradients of the block's rows so far.
      dead: weights of C latents, all dead ones of this shard among them, and pre_bias.
      alive_C: True where row C is not a dead latent.
      x_bD: normalised tokens, own rows; e_bD: their residuals, a constant.
      scale: factor of the squared error in the loss.
      spec: static settings.

    Returns:
      The gradients, `sum ||e - e_hat||^2` over own rows, and the tokens at capacity (see `select`).
    """
    centred_BD = collectives.gather_tokens(x_bD - dead["pre_bias"], spec.dtype)
    bias_C = jnp.where(alive_C, -jnp.inf, dead["latent_bias"])
    code, cut = select(centred_BD, dead["w_enc"], bias_C, spec.aux, spec)
    error = code.reconstruct(e_bD, dead["w_dec"], spec.dtype)
    total = add_gradients(total, code, error, centred_BD, -2 * scale, gather_codes=False)
    return total, error.squared, cut
