"""The evaluation of one autoencoder: every held-out figure of a run, as one dictionary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from saejax.evals import baselines, rows
from saejax.evals.downstream import DownstreamInputs, downstream
from saejax.evals.metrics import LatentStatistics, Reconstruction

Blocks = Callable[[], Iterable[np.ndarray]]
"""Starts a new pass over blocks of raw activations ``[..., D]``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What the evaluation runs, and on how much.

    Attributes:
      tokens: held-out activations for the reconstruction and sparsity figures; None for all.
      downstream_tokens: held-out tokens for the subject's loss, in whole contexts; None for all,
        0 to leave that part out.
      batch_size: rows of one device batch.
      batch_contexts: contexts of one device batch of the subject model.
      pca: compare with PCA of k components.
      pca_tokens: training activations to fit it on.
      untrained: compare with the same architecture at its initialisation.
      decades: decades of the density histogram, from 10^-decades to 1.
    """

    tokens: int | None = None
    downstream_tokens: int | None = 131_072
    batch_size: int = 4096
    batch_contexts: int = 32
    pca: bool = True
    pca_tokens: int = 262_144
    untrained: bool = True
    decades: int = 8

    def __post_init__(self):
        for name in ("batch_size", "batch_contexts", "pca_tokens", "decades"):
            _at_least(name, getattr(self, name), 1)
        if self.tokens is not None:
            _at_least("tokens", self.tokens, 2)
        if self.downstream_tokens is not None:
            _at_least("downstream_tokens", self.downstream_tokens, 0)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(
            f"EvaluationConfig.{name}: {value}; allowed: {least} or more; set {name} >= {least}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """What one pass over held-out activations measures.

    Attributes:
      normalized: reconstruction in the model's normalised space, where NMSE is defined.
      raw: reconstruction in the space of the subject model.
      latents: per-latent statistics.
    """

    normalized: Reconstruction
    raw: Reconstruction
    latents: LatentStatistics


def reconstruct(
    sae, blocks: Iterable[np.ndarray], *, batch_size: int, limit: int | None = None
) -> Pass:
    """Codes and rebuilds every row once, and merges all that is measured on the way.

    Args:
      sae: the autoencoder (``saejax.model.sae.SAE``).
      blocks: raw activations ``[..., D]``.
      batch_size: rows of a device batch; no figure depends on it.
      limit: at most this many rows.

    Raises:
      ValueError: no rows, or rows with NaN or infinity.
    """
    result: Pass | None = None
    for batch in rows.code_rows(sae, blocks, batch_size=batch_size, limit=limit):
        part = Pass(
            normalized=Reconstruction.of(batch.x_n, batch.x_hat_n),
            raw=Reconstruction.of(batch.x, batch.x_hat),
            latents=LatentStatistics.of(batch.values, batch.indices, sae.config.n_latents),
        )
        result = part if result is None else merge_passes(result, part)
    if result is None:
        raise ValueError(
            "held_out: 0 activations; allowed: at least 2; harvest held-out text (Harvest."
            "held_out_tokens, Text.held_out_percent)"
        )
    return result


def merge_passes(a: Pass, b: Pass) -> Pass:
    """Both passes together, as if made over all their rows at once."""
    return Pass(
        normalized=a.normalized.merge(b.normalized),
        raw=a.raw.merge(b.raw),
        latents=a.latents.merge(b.latents),
    )


def _describe(done: Pass, d_model: int, decades: int) -> dict[str, Any]:
    latents = done.latents
    # Nothing fired: the shares of activations are undefined, all else is not.
    share = latents.densest_share(d_model) if latents.count.any() else None
    return {
        "tokens": done.normalized.moments.count,
        "nmse": done.normalized.nmse,
        "explained_variance": done.raw.explained_variance,
        "cosine": done.normalized.mean_cosine,
        "shrinkage": done.normalized.shrinkage,
        "l0": latents.l0,
        "dead_fraction": latents.dead_fraction,
        "dense_fraction_1_percent": latents.dense_fraction(0.01),
        "dense_fraction_10_percent": latents.dense_fraction(0.1),
        "densest_density_over_l0": share,
        "densest_share_of_activations": share and share * min(d_model, latents.count.size),
        "density_histogram": latents.density_histogram(decades=decades),
    }


def evaluate(
    sae,
    held_out: Blocks,
    config: EvaluationConfig | None = None,
    *,
    train_rows: Blocks | None = None,
    untrained: Any = None,
    inputs: DownstreamInputs | None = None,
    extra: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], LatentStatistics]:
    """Measures an autoencoder on held-out activations.

    Args:
      sae: the trained autoencoder.
      held_out: starts a pass over blocks of raw held-out activations ``[..., D]``.
      config: what to run; the defaults when None.
      train_rows: starts a pass over training activations, for PCA; None leaves PCA out.
      untrained: the same architecture at its initialisation; None leaves it out.
      inputs: the subject model and its held-out contexts; None (synthetic data) leaves the
        downstream figures out.
      extra: figures measured elsewhere (recovery scores, dead latents by the training
        definition), added as they are.

    Returns:
      The figures as plain Python numbers, ready for JSON, and the per-latent statistics of the
      same tokens, for the report.

    Raises:
      ValueError: no held-out rows, or any figure that is not finite.
    """
    config = config or EvaluationConfig()
    size, limit = config.batch_size, config.tokens
    done = reconstruct(sae, held_out(), batch_size=size, limit=limit)
    result = _describe(done, sae.config.d_model, config.decades)
    result["baselines"] = {"mean_nmse": baselines.MEAN_NMSE}
    if config.pca and train_rows is not None:
        components = min(sae.config.k, sae.config.d_model)
        fitted = baselines.fit_pca(
            rows.normalized_rows(sae, train_rows(), batch_size=size, limit=config.pca_tokens),
            components,
        )
        held = rows.normalized_rows(sae, held_out(), batch_size=size, limit=limit)
        result["baselines"]["pca_nmse"] = baselines.pca_nmse(fitted, held)
        result["baselines"]["pca_components"] = components
    if config.untrained and untrained is not None:
        fresh = reconstruct(untrained, held_out(), batch_size=size, limit=limit)
        result["baselines"]["untrained_nmse"] = fresh.normalized.nmse
    if inputs is not None and config.downstream_tokens != 0:
        state = downstream(
            sae, inputs, batch_contexts=config.batch_contexts, tokens=config.downstream_tokens
        )
        result |= state.compute() | {"site": inputs.site, "first_position": inputs.first_position}
    return plain({**result, **(extra or {})}), done.latents


def plain(value: Any, name: str = "evaluation") -> Any:
    """Copies nested figures into plain Python types; a figure that is not finite is an error."""
    if isinstance(value, dict):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist(), name)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{name}: {value}; allowed: finite figures; look at the training curves and the data"
        )
    if not isinstance(value, str | int | float | bool | None):
        raise TypeError(f"{name}: {type(value).__name__}; allowed: numbers, text, lists, tables")
    return value


def format_table(result: dict[str, Any]) -> str:
    """The figures as a short plain-text table, for the terminal."""
    base = result.get("baselines", {})
    lines = [f"held-out evaluation, {result['tokens']:,} tokens", ""]

    def line(label: str, *cells: str) -> None:
        lines.append(f"  {label:<28}" + "".join(f"{cell:>14}" for cell in cells))

    line("reconstruction", "NMSE", "EV")
    line("this autoencoder", f"{result['nmse']:.4f}", f"{result['explained_variance']:.4f}")
    if "pca_nmse" in base:
        line(f"PCA, {base['pca_components']} components", f"{base['pca_nmse']:.4f}")
    if "untrained_nmse" in base:
        line("untrained dictionary", f"{base['untrained_nmse']:.4f}")
    line("predicting the mean", f"{base.get('mean_nmse', 1.0):.4f}")
    lines.append("")
    line("L0", f"{result['l0']:.2f}")
    line("dead latents", f"{result['dead_fraction']:.2%}")
    line("latents denser than 10 %", f"{result['dense_fraction_10_percent']:.2%}")
    if "delta_ce" in result:
        count, clean = result["downstream_tokens"], result["ce_clean"]
        lines.append("")
        lines.append(f"  subject's loss at {result['site']}")
        lines.append(f"  {count:,} predictions, clean {clean:.4f} nats")
        line("put back", "delta CE", "KL", "recovered")
        ours = (result["delta_ce"], result["kl"])
        line("reconstruction", *(f"{v:.4f}" for v in ours))
        for kind in ("mean", "zero"):
            line(
                f"{kind} ablation",
                f"{result[f'delta_ce_{kind}_ablation']:.4f}",
                f"{result[f'kl_{kind}_ablation']:.4f}",
                f"{result[f'recovered_{kind}_ablation']:.4f}",
            )
    return "\n".join(lines)
