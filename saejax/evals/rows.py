"""Rows through an autoencoder: regrouped into equal batches, so shapes compile once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedRows:
    """One batch of rows with what the autoencoder made of them, as host arrays.

    Attributes:
      x, x_hat: raw activations and their reconstruction ``[B, D]``, float64.
      x_n, x_hat_n: both in the model's normalised space ``[B, D]``, float64.
      values, indices: the sparse code ``[B, K]``, float32 and int32.
    """

    x: np.ndarray
    x_hat: np.ndarray
    x_n: np.ndarray
    x_hat_n: np.ndarray
    values: np.ndarray
    indices: np.ndarray


@jax.jit
def _code(sae, x_BD):
    latents = sae.encode(x_BD)
    # Decoding with the identity normalisation stays in the normalised space, for every kind of it.
    bare = dataclasses.replace(
        latents, offset=jnp.zeros_like(latents.offset), scale=jnp.ones_like(latents.scale)
    )
    x_n, _, _ = sae.normalizer.apply(x_BD)
    return sae.decode(latents), x_n, sae.decode(bare), latents.values, latents.indices


@jax.jit
def _normalize(sae, x_BD):
    return sae.normalizer.apply(x_BD)[0]


def regroup(
    blocks: Iterable[np.ndarray], batch_size: int, limit: int | None = None
) -> Iterator[np.ndarray]:
    """Yields the rows of ``blocks`` in order as float32 ``[batch_size, D]``, the last one shorter.

    Args:
      blocks: arrays ``[..., D]`` of any float dtype; leading dimensions are flattened.
      batch_size: rows of a batch.
      limit: at most this many rows in all; None for every row.

    Raises:
      ValueError: rows with NaN or infinity (the block is named) or blocks of unequal width.
    """
    held: list[np.ndarray] = []
    count, left = 0, np.inf if limit is None else limit
    for number, block in enumerate(blocks):
        rows_ND = np.asarray(block).reshape(-1, np.shape(block)[-1]).astype(np.float32)
        rows_ND = rows_ND[: None if left == np.inf else int(left)]
        _check_block(rows_ND, number, held)
        left -= len(rows_ND)
        held.append(rows_ND)
        count += len(rows_ND)
        if count >= batch_size:
            joined_ND = np.concatenate(held)
            full = count - count % batch_size
            yield from np.split(joined_ND[:full], full // batch_size)
            held, count = [joined_ND[full:]], count - full
        if left <= 0:
            break
    if count:
        yield np.concatenate(held)


def _check_block(rows_ND: np.ndarray, number: int, held: list[np.ndarray]) -> None:
    if not np.isfinite(rows_ND).all():
        bad = int((~np.isfinite(rows_ND)).any(axis=1).sum())
        raise ValueError(
            f"activations: {bad} rows of block {number} hold NaN or infinity; allowed: finite "
            "values; harvest the shard again"
        )
    if held and held[-1].shape[1] != rows_ND.shape[1]:
        raise ValueError(
            f"activations: block {number} is {rows_ND.shape[1]} wide; allowed: "
            f"{held[-1].shape[1]}, the width of the blocks before it"
        )


def _padded(rows_ND: np.ndarray, batch_size: int) -> jax.Array:
    # The last batch repeats its first row, so every call has one shape and compiles once.
    fill = np.broadcast_to(rows_ND[:1], (batch_size - len(rows_ND), rows_ND.shape[1]))
    return jnp.asarray(np.concatenate([rows_ND, fill]))


def code_rows(
    sae, blocks: Iterable[np.ndarray], *, batch_size: int, limit: int | None = None
) -> Iterator[CodedRows]:
    """Encodes and decodes raw rows batch by batch; see ``regroup`` for ``blocks`` and ``limit``."""
    for rows_ND in regroup(blocks, batch_size, limit):
        count = len(rows_ND)
        out = [np.asarray(a)[:count] for a in _code(sae, _padded(rows_ND, batch_size))]
        x_hat, x_n, x_hat_n, values, indices = out
        yield CodedRows(
            x=rows_ND.astype(np.float64),
            x_hat=x_hat.astype(np.float64),
            x_n=x_n.astype(np.float64),
            x_hat_n=x_hat_n.astype(np.float64),
            values=values,
            indices=indices,
        )


def normalized_rows(
    sae, blocks: Iterable[np.ndarray], *, batch_size: int, limit: int | None = None
) -> Iterator[np.ndarray]:
    """Raw rows in the model's normalised space, float64 ``[B, D]`` batches."""
    for rows_ND in regroup(blocks, batch_size, limit):
        x_n = _normalize(sae, _padded(rows_ND, batch_size))
        yield np.asarray(x_n)[: len(rows_ND)].astype(np.float64)
