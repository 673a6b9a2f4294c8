"""Metrics as frozen states of sums and counts that merge, divided once at the end.

Every state has ``of`` (from one block of rows), ``merge`` and properties that divide. Sums are kept
in float64 on the host, second moments about the block's own mean (Chan, Golub and LeVeque's
pairwise update), so no result depends on how the rows were split and none suffers cancellation.
"""

from __future__ import annotations

import dataclasses

import numpy as np


def _check_rows(x_BD: np.ndarray, name: str) -> np.ndarray:
    x_BD = np.asarray(x_BD, np.float64)
    if x_BD.ndim != 2 or not len(x_BD):
        raise ValueError(f"{name}: shape {x_BD.shape}; allowed: [rows >= 1, width]; pass 2-D rows")
    if not np.isfinite(x_BD).all():
        bad = int((~np.isfinite(x_BD)).any(axis=1).sum())
        raise ValueError(
            f"{name}: {bad} of {len(x_BD)} rows hold NaN or infinity; allowed: finite values; "
            "look for the rows in the activation store or for a diverged training run"
        )
    return x_BD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and total squared deviation of a set of row vectors.

    Attributes:
      count: number of rows.
      mean: float64 ``[D]``; zeros when the set is empty.
      deviation: float64 scalar, ``sum ||x - mean||^2``.
    """

    count: int
    mean: np.ndarray
    deviation: float

    @classmethod
    def empty(cls, width: int) -> Moments:
        """The moments of no rows, the identity of ``merge``."""
        return cls(count=0, mean=np.zeros(width), deviation=0.0)

    @classmethod
    def of(cls, x_BD: np.ndarray) -> Moments:
        """The moments of one block of rows ``[B, D]``."""
        x_BD = _check_rows(x_BD, "rows")
        mean_D = x_BD.mean(axis=0)
        return cls(count=len(x_BD), mean=mean_D, deviation=float(((x_BD - mean_D) ** 2).sum()))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"width: {self.mean.shape[0]} and {other.mean.shape[0]}; allowed: equal widths; "
                "merge states of one model only"
            )
        count = self.count + other.count
        if not count:
            return self
        share = other.count / count
        delta_D = other.mean - self.mean
        between = self.count * share * float(delta_D @ delta_D)
        return Moments(
            count=count,
            mean=self.mean + share * delta_D,
            deviation=self.deviation + other.deviation + between,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How well rows are rebuilt, as mergeable sums.

    Attributes:
      moments: moments of the original rows.
      squared_error: ``sum ||x - x_hat||^2``.
      cosine: sum over rows of ``cos(x, x_hat)``; a zero vector counts as cosine 0.
      norm_ratio: sum over rows of ``||x_hat|| / ||x||``.
      ratio_rows: rows with ``||x|| > 0``, over which the ratio is defined.
    """

    moments: Moments
    squared_error: float
    cosine: float
    norm_ratio: float
    ratio_rows: int

    @classmethod
    def empty(cls, width: int) -> Reconstruction:
        """The state of no rows, the identity of ``merge``."""
        return cls(
            moments=Moments.empty(width),
            squared_error=0.0,
            cosine=0.0,
            norm_ratio=0.0,
            ratio_rows=0,
        )

    @classmethod
    def of(cls, x_BD: np.ndarray, x_hat_BD: np.ndarray) -> Reconstruction:
        """The state of one block of rows and their reconstructions, both ``[B, D]``."""
        x_BD, x_hat_BD = _check_rows(x_BD, "rows"), _check_rows(x_hat_BD, "reconstruction")
        if x_BD.shape != x_hat_BD.shape:
            raise ValueError(
                f"reconstruction: shape {x_hat_BD.shape}; allowed: {x_BD.shape}, that of the rows"
            )
        norm_B = np.linalg.norm(x_BD, axis=1)
        hat_norm_B = np.linalg.norm(x_hat_BD, axis=1)
        product_B = norm_B * hat_norm_B
        dot_B = np.einsum("bd,bd->b", x_BD, x_hat_BD)
        cosine_B = np.divide(dot_B, product_B, out=np.zeros_like(dot_B), where=product_B > 0)
        ratio_B = np.divide(hat_norm_B, norm_B, out=np.zeros_like(norm_B), where=norm_B > 0)
        return cls(
            moments=Moments.of(x_BD),
            squared_error=float(((x_BD - x_hat_BD) ** 2).sum()),
            cosine=float(cosine_B.sum()),
            norm_ratio=float(ratio_B.sum()),
            ratio_rows=int((norm_B > 0).sum()),
        )

    def merge(self, other: Reconstruction) -> Reconstruction:
        """The state of both sets together."""
        return Reconstruction(
            moments=self.moments.merge(other.moments),
            squared_error=self.squared_error + other.squared_error,
            cosine=self.cosine + other.cosine,
            norm_ratio=self.norm_ratio + other.norm_ratio,
            ratio_rows=self.ratio_rows + other.ratio_rows,
        )

    @property
    def nmse(self) -> float:
        """``sum ||x - x_hat||^2 / sum ||x - mean||^2`` over the whole set (Gao et al. 2024, §2.1).

        The paper's figure when the rows are in the model's normalised space. Predicting the mean
        vector of the set scores 1. Raises ValueError on an empty set or one without variance.
        """
        if not self.moments.count or self.moments.deviation <= 0:
            raise ValueError(
                f"rows: {self.moments.count} rows with total variance {self.moments.deviation:g}; "
                "allowed: rows that differ; evaluate on more held-out tokens"
            )
        return self.squared_error / self.moments.deviation

    @property
    def explained_variance(self) -> float:
        """``1 - nmse`` of the same rows: sums over the whole set, never a mean of ratios."""
        return 1.0 - self.nmse

    @property
    def mean_cosine(self) -> float:
        """Mean over rows of the cosine between a row and its reconstruction."""
        return self.cosine / _positive(self.moments.count, "rows")

    @property
    def shrinkage(self) -> float:
        """Mean over rows of ``||x_hat|| / ||x||``; 1 is none, less is shrunk."""
        return self.norm_ratio / _positive(self.ratio_rows, "rows with a norm above zero")


def _positive(count: int, what: str) -> int:
    if count <= 0:
        raise ValueError(f"{what}: {count}; allowed: at least 1; evaluate on more held-out tokens")
    return count


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Exact per-latent sums over tokens, from the sparse code alone.

    Attributes:
      tokens: number of tokens seen.
      count: int64 ``[L]``, tokens on which the latent was active (value not 0).
      total: float64 ``[L]``, sum of values.
      square: float64 ``[L]``, sum of squared values.
      peak: float64 ``[L]``, largest value, or 0 where none is positive.
    """

    tokens: int
    count: np.ndarray
    total: np.ndarray
    square: np.ndarray
    peak: np.ndarray

    @classmethod
    def empty(cls, n_latents: int) -> LatentStatistics:
        """The statistics of no tokens, the identity of ``merge``."""
        zeros = np.zeros(n_latents)
        return cls(
            tokens=0, count=np.zeros(n_latents, np.int64), total=zeros, square=zeros, peak=zeros
        )

    @classmethod
    def of(cls, values: np.ndarray, indices: np.ndarray, n_latents: int) -> LatentStatistics:
        """The statistics of one block of codes; ``values`` and ``indices`` are ``[..., K]``.

        Raises ValueError when an active index lies outside ``[0, n_latents)``.
        """
        values, indices = np.asarray(values), np.asarray(indices)
        tokens = int(np.prod(values.shape[:-1]))
        active = values != 0  # without ReLU, negative latents are active too
        index_E = indices[active].astype(np.int64)
        value_E = values[active].astype(np.float64)
        if index_E.size and (index_E.min() < 0 or index_E.max() >= n_latents):
            raise ValueError(
                f"indices: {index_E.min()}..{index_E.max()}; allowed: 0..{n_latents - 1}"
            )
        peak_L = np.zeros(n_latents)
        np.maximum.at(peak_L, index_E, value_E)
        return cls(
            tokens=tokens,
            count=np.bincount(index_E, minlength=n_latents).astype(np.int64),
            total=np.bincount(index_E, weights=value_E, minlength=n_latents),
            square=np.bincount(index_E, weights=value_E**2, minlength=n_latents),
            peak=peak_L,
        )

    def merge(self, other: LatentStatistics) -> LatentStatistics:
        """The statistics of both sets of tokens together."""
        if self.count.shape != other.count.shape:
            raise ValueError(
                f"n_latents: {self.count.size} and {other.count.size}; allowed: equal counts; "
                "merge states of one model only"
            )
        return LatentStatistics(
            tokens=self.tokens + other.tokens,
            count=self.count + other.count,
            total=self.total + other.total,
            square=self.square + other.square,
            peak=np.maximum(self.peak, other.peak),
        )

    @property
    def density(self) -> np.ndarray:
        """float64 ``[L]``: share of tokens on which each latent is active."""
        return self.count / _positive(self.tokens, "tokens")

    @property
    def mean_when_active(self) -> np.ndarray:
        """float64 ``[L]``: mean value over the tokens it is active on, 0 where it never is."""
        return self.total / np.maximum(self.count, 1)

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return float(self.count.sum()) / _positive(self.tokens, "tokens")

    @property
    def dead_fraction(self) -> float:
        """Share of latents that fired on none of the tokens seen."""
        _positive(self.tokens, "tokens")
        return float((self.count == 0).mean())

    def dense_fraction(self, above: float) -> float:
        """Share of latents active on more than ``above`` of the tokens."""
        return float((self.density > above).mean())

    def densest_share(self, d_model: int) -> float:
        """Mean density of the ``d_model`` densest latents over L0 (Gao et al. 2024, App. E.5).

        At most ``1 / d_model``, reached when those latents carry every activation: the sign of a
        dense solution. With fewer latents than ``d_model``, over all of them.
        """
        densest = np.sort(self.density)[::-1][:d_model]
        if self.l0 <= 0:
            raise ValueError("l0: 0; allowed: above 0; no latent fired on the evaluated tokens")
        return float(densest.mean()) / self.l0

    def density_histogram(self, bins_per_decade: int = 4, decades: int = 8) -> dict[str, list]:
        """Histogram of log10 density over the latents that fired.

        Returns ``{"log10_edges": [...], "latents": [...]}``; edges run from ``-decades`` to 0, a
        density below the first edge counts in the first bin. Dead latents are in no bin.
        """
        density = self.density[self.count > 0]
        edges = np.linspace(-decades, 0, decades * bins_per_decade + 1)
        latents, _ = np.histogram(np.clip(np.log10(density), edges[0], edges[-1]), edges)
        return {"log10_edges": edges.tolist(), "latents": latents.tolist()}
