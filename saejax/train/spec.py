"""The static settings of a step that follow from a configuration and a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from saejax.capacity import TopKConfig
from saejax.mesh import MeshShape
from saejax.model.codes import dense_below
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train.loss import LossConfig, LossSpec, Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
    """Static settings of the step.

    Attributes:
      loss: of the loss functions.
      normalizer: applied to the raw activations.
      batch_tokens: tokens per step over the whole mesh.
      chunks: blocks that each data row's tokens are processed in; the result does not depend on
        it beyond rounding.
    """

    loss: LossSpec
    normalizer: Normalizer
    batch_tokens: int
    chunks: int


def loss_spec(
    sae: SAEConfig,
    loss: LossConfig,
    topk: TopKConfig,
    shards: int,
    *,
    platform: str | None = None,
    gather_codes: bool = False,
) -> LossSpec:
    """Resolves the loss settings for a model on so many latent shards.

    Args:
      sae, loss, topk: the configurations.
      shards: latent shards.
      platform: of the devices; decides the compute dtype and where codes are dense. None is the
        default backend's.
      gather_codes: see `LossSpec`.

    Raises:
      ValueError: k_aux or the Multi-TopK k exceeds the number of latents.
    """
    k_aux = loss.resolve_k_aux(sae.d_model, sae.n_latents)
    if k_aux > sae.n_latents:
        raise ValueError(
            f"Loss.k_aux = {k_aux} must not exceed SAE.n_latents = {sae.n_latents}; lower it, or "
            f"leave it None for a power of two near d_model / 2"
        )
    k_multi = sae.k * loss.multi_topk_factor if loss.multi_topk_coefficient else 0
    if k_multi > sae.n_latents:
        raise ValueError(
            f"Loss.multi_topk_factor = {loss.multi_topk_factor} times SAE.k = {sae.k} exceeds "
            f"SAE.n_latents = {sae.n_latents}; lower one of them or set "
            f"Loss.multi_topk_coefficient = 0"
        )

    def selection(k: int) -> Selection:
        return Selection(k=k, capacity=topk.capacity(k, sae.n_latents, shards))

    platform = platform or jax.default_backend()
    return LossSpec(
        main=selection(sae.k),
        multi=selection(k_multi) if k_multi else None,
        aux=selection(k_aux),
        multi_coefficient=loss.multi_topk_coefficient,
        auxk_coefficient=loss.auxk_coefficient,
        dead_tokens=loss.dead_tokens,
        relu=sae.relu,
        dtype=sae.dtype_on(platform),
        exchange=topk.exchange,
        dense_below=dense_below(platform),
        gather_codes=gather_codes,
    )


def step_spec(
    sae: SAEConfig,
    loss: LossConfig,
    topk: TopKConfig,
    normalizer: Normalizer,
    shape: MeshShape,
    *,
    batch_tokens: int,
    chunks: int,
    platform: str,
    data_exchange: str,
) -> StepSpec:
    """Static settings of a step on a mesh of devices of one platform; see `make_step`."""
    dtype = sae.dtype_on(platform)
    gather = data_exchange == "codes"
    if data_exchange == "auto":
        gather = gathering_codes_is_cheaper(sae, loss, shape, batch_tokens, dtype)
    return StepSpec(
        loss=loss_spec(
            sae,
            loss,
            topk,
            shape.latent,
            platform=platform,
            gather_codes=gather and shape.data > 1,
        ),
        normalizer=normalizer,
        batch_tokens=batch_tokens,
        chunks=chunks,
    )


def selection_metadata(spec: LossSpec, shards: int) -> dict[str, Any]:
    """What a checkpoint keeps of the selection it was trained with: shards and capacities."""
    chosen = {"main": spec.main, "multi": spec.multi, "aux": spec.aux}
    return {
        "shards": shards,
        "capacity": {name: s.capacity for name, s in chosen.items() if s is not None},
    }


def gathering_codes_is_cheaper(
    sae: SAEConfig, loss: LossConfig, shape: MeshShape, batch_tokens: int, dtype: jnp.dtype
) -> bool:
    """Whether weight gradients should be made from gathered codes rather than summed over 'data'.

    By the bytes each device receives: a ring sum moves every float32 gradient of the shard twice;
    gathering moves the inputs and residuals of all tokens, once for each reconstruction, and lists
    of codes that are small beside them.
    """
    gradients = 2 * 2 * 4 * (sae.n_latents // shape.latent)
    terms = 2 if loss.multi_topk_coefficient else 1
    codes = 2 * terms * jnp.dtype(dtype).itemsize * batch_tokens
    return shape.data > 1 and codes < gradients
