"""The static settings of a step that follow from a configuration and a mesh."""

import dataclasses
from typing import Any, Literal

import jax

from saejax.capacity import TopKConfig
from saejax.mesh import MeshShape
from saejax.model import sparse
from saejax.model.codes import gathered_arrays
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train.loss import LossConfig, LossSpec, Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How a step computes; the result is the same up to rounding.

    Attributes:
      implementation: of the operations that have it, "mosaic_gpu", "mosaic_tpu", "xla" or
        "reference", all of which must be able to run it; None picks for each by device, jax
        version and shape.
      gradients: "sparse", or "dense": autodiff through dense codes, for debugging small models. A
        dense step takes the whole batch at once, whatever the microbatch.
    """

    implementation: str | None = None
    gradients: Literal["sparse", "dense"] = "sparse"

    def __post_init__(self):
        allowed = (None, "mosaic_gpu", "mosaic_tpu", "xla", "reference")
        if self.implementation not in allowed:
            raise ValueError(f"implementation = {self.implementation!r} must be one of {allowed}")
        if self.gradients not in ("sparse", "dense"):
            raise ValueError(f"gradients = {self.gradients!r} must be 'sparse' or 'dense'")


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
    device_kind: str = "",
) -> LossSpec:
    """Resolves the loss settings for a model on so many latent shards.

    Args:
      sae, loss, topk: the configurations.
      shards: latent shards.
      platform: of the devices; decides the compute dtype and where codes are dense. None is the
        default backend's.
      device_kind: see `sparse.dense_below`.

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
        dense_below=sparse.dense_below(platform, device_kind),
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
    device_kind: str = "",
) -> StepSpec:
    """Static settings of a step on a mesh of devices of one kind; see `make_step`."""
    where = {"platform": platform, "device_kind": device_kind}
    spec = loss_spec(sae, loss, topk, shape.latent, **where)
    gather = data_exchange == "codes"
    if data_exchange == "auto":
        gathered, summed = bytes_over_data(spec, sae, shape, batch_tokens)
        gather = gathered < summed
    return StepSpec(
        loss=dataclasses.replace(spec, gather_codes=gather and shape.data > 1),
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


def bytes_over_data(
    spec: LossSpec, sae: SAEConfig, shape: MeshShape, batch_tokens: int
) -> tuple[float, float]:
    """Bytes each device receives over 'data': if codes are gathered, and if gradients are summed.

    Gathering moves code, input and residual of every token, once for each reconstruction; a ring
    sum moves every float32 gradient of the shard twice.
    """
    n_latents = sae.n_latents // shape.latent
    gradients = 2 * 2 * 4 * n_latents * sae.d_model
    codes = 0
    for wanted in (spec.main, spec.multi):
        if wanted is not None:
            _, code = gathered_arrays(
                wanted.k, wanted.capacity, n_latents, shape.latent, spec.dense_below
            )
            codes += batch_tokens * (code + 2 * spec.dtype.itemsize * sae.d_model)
    share = 1 - 1 / shape.data
    return codes * share, gradients * share
