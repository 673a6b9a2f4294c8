"""Baselines beside the autoencoder: PCA of as many components, the mean, an untrained dictionary.

The untrained dictionary is the same architecture at its initialisation; it is passed through the
same code path as the trained one (``suite.reconstruct``) and has no code of its own here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from saejax.evals import metrics

MEAN_NMSE = 1.0  # predicting the mean vector of the evaluated set, by the definition of NMSE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Covariance:
    """Mergeable mean and scatter matrix of row vectors, float64.

    Attributes:
      count: number of rows.
      mean: ``[D]``.
      scatter: ``[D, D]``, ``sum (x - mean)(x - mean)^T``.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, x_BD: np.ndarray) -> Covariance:
        """The state of one block of rows ``[B, D]``."""
        x_BD = np.asarray(x_BD, np.float64)
        mean_D = x_BD.mean(axis=0)
        centred_BD = x_BD - mean_D
        return cls(count=len(x_BD), mean=mean_D, scatter=centred_BD.T @ centred_BD)

    def merge(self, other: Covariance) -> Covariance:
        """The state of both sets together."""
        count = self.count + other.count
        delta_D = other.mean - self.mean
        share = other.count / count
        between_DD = self.count * share * np.outer(delta_D, delta_D)
        return Covariance(
            count=count,
            mean=self.mean + share * delta_D,
            scatter=self.scatter + other.scatter + between_DD,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PCA:
    """The best linear reconstruction of a given rank.

    Attributes:
      mean: ``[D]``, mean of the rows it was fitted on.
      components: ``[K, D]``, orthonormal rows, largest variance first.
    """

    mean: np.ndarray
    components: np.ndarray

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray:
        """Projects rows ``[B, D]`` on the components around the fitted mean."""
        return self.mean + (x_BD - self.mean) @ self.components.T @ self.components


def fit_pca(blocks: Iterable[np.ndarray], k: int) -> PCA:
    """Fits ``k`` principal components to blocks of rows ``[B, D]``, exactly, in float64.

    Raises ValueError when there are no rows or ``k`` exceeds the width.
    """
    state: Covariance | None = None
    for x_BD in blocks:
        block = Covariance.of(x_BD)
        state = block if state is None else state.merge(block)
    if state is None:
        raise ValueError("train_rows: 0 rows; allowed: at least 1; pass rows to fit PCA on")
    if not 1 <= k <= state.mean.size:
        raise ValueError(f"k: {k}; allowed: 1..{state.mean.size}, the width of the rows")
    _, vectors_DD = np.linalg.eigh(state.scatter)
    return PCA(mean=state.mean, components=vectors_DD[:, ::-1][:, :k].T)


def pca_nmse(pca: PCA, blocks: Iterable[np.ndarray]) -> float:
    """NMSE of a fitted PCA on held-out blocks of rows, about the held-out rows' own mean."""
    state: metrics.Reconstruction | None = None
    for x_BD in blocks:
        block = metrics.Reconstruction.of(x_BD, pca.reconstruct(x_BD))
        state = block if state is None else state.merge(block)
    if state is None:
        raise ValueError("held_out: 0 rows; allowed: at least 1; harvest held-out tokens")
    return state.nmse
