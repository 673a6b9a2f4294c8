"""What offering few candidates a shard does to a trained autoencoder, measured on one device.

Training splits the latents into S contiguous blocks, lets each offer its best c candidates and
keeps the k best of all offers (`saejax.capacity`). Here the same selection is simulated for any S
on the dense pre-activations, beside the exact one: what is lost, and what that costs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from saejax.capacity import TopKConfig, exact_capacity, expected_loss, warning_share
from saejax.evals.metrics import Reconstruction
from saejax.evals.rows import regroup
from saejax.model import sparse
from saejax.types import Latents

RULES = {
    "default": TopKConfig(),
    "factor 2": TopKConfig(max_expected_loss=None),
    "exact": TopKConfig(capacity_factor=None),
}
"""The default capacity, the paper's bare capacity factor, and every candidate."""

_PRE_ACTIVATIONS = 2**24  # of one batch, so that memory does not grow with the latents
_MOST_ROWS = 4096
_ROWS_AGAIN = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncation:
    """One rule on one number of shards, against the exact top-k of the same tokens.

    Attributes:
      shards, rule, capacity: contiguous blocks of latents, the name of the rule, and the
        candidates that each block offers under it.
      tokens: tokens measured.
      expected_loss: share of the exact top-k that is lost where latents are placed at random.
      lost: the same, measured.
      changed: share of tokens whose selected set differs from the exact one.
      at_capacity: share of (token, shard) pairs whose every candidate was kept, so that better
        ones may have been cut; 0 where the capacity is exact.
      warn_above: the share of such pairs above which training warns.
      nmse, nmse_exact: normalised MSE with this selection and with the exact one.
    """

    shards: int
    rule: str
    capacity: int
    tokens: int
    expected_loss: float
    lost: float
    changed: float
    at_capacity: float
    warn_above: float
    nmse: float
    nmse_exact: float

    @property
    def nmse_change(self) -> float:
        """Relative change of the normalised MSE: what training at this capacity does not see."""
        return self.nmse / self.nmse_exact - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Counts:
    """What a selection did to some tokens, as sums."""

    lost: int
    changed: int
    at_capacity: int
    quality: Reconstruction

    def merge(self, other: _Counts) -> _Counts:
        return _Counts(
            lost=self.lost + other.lost,
            changed=self.changed + other.changed,
            at_capacity=self.at_capacity + other.at_capacity,
            quality=self.quality.merge(other.quality),
        )


def select(h_BL: jax.Array, k: int, shards: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Values and indices `[B, k]` of the k best offers, as training on `shards` shards finds them.

    Args:
      h_BL: pre-activations, float32 or wider.
      k: latents kept.
      shards: contiguous blocks of L / shards latents.
      capacity: candidates that each block offers, at least k / shards of them.

    Returns:
      Both in descending order of value. Equal values fall to the lowest index, in a block and
      among the offers, which stand in the order of their blocks.

    Raises:
      ValueError: the shards do not divide the latents, or offer fewer than k.
    """
    n_tokens, n_latents = h_BL.shape
    most = exact_capacity(k, n_latents, shards)
    if not (1 <= capacity <= n_latents // shards and shards * capacity >= k):
        raise ValueError(
            f"capacity = {capacity} on {shards} shards of {n_latents // shards} latents cannot "
            f"give k = {k}; it must lie between {-(-k // shards)} and {n_latents // shards} "
            f"({most} is exact)"
        )
    width = n_latents // shards
    values_RC, local_RC = sparse.top_k(h_BL.reshape(n_tokens * shards, width), capacity)
    first_S1 = width * jnp.arange(shards, dtype=local_RC.dtype)[:, None]
    indices_BSC = local_RC.reshape(n_tokens, shards, capacity) + first_S1
    offers = (n_tokens, shards * capacity)
    values_BK, place_BK = sparse.top_k(values_RC.reshape(offers), k)
    return values_BK, jnp.take_along_axis(indices_BSC.reshape(offers), place_BK, axis=1)


@jax.jit
def _encode_exactly(sae, x_BD):
    """Normalised rows, pre-activations, and the exact selection with its reconstruction."""
    x_n, _, _ = sae.normalizer.apply(x_BD)
    h_BL = sae.pre_activations(x_BD)
    values_BK, indices_BK = sparse.top_k(h_BL, sae.config.k)
    return x_n, h_BL, indices_BK, _rebuild(sae, values_BK, indices_BK)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _select_again(sae, h_BL, rows_R, shards: int, capacity: int):
    """The truncated selection of some rows, with its reconstruction."""
    values_RK, indices_RK = select(h_BL[rows_R], sae.config.k, shards, capacity)
    return indices_RK, _rebuild(sae, values_RK, indices_RK)


def _rebuild(sae, values_BK, indices_BK):
    """The reconstruction in the normalised space, where NMSE is defined."""
    values_BK = jax.nn.relu(values_BK) if sae.config.relu else values_BK
    zero_B1 = jnp.zeros((len(values_BK), 1), values_BK.dtype)
    return sae.decode(
        Latents(values=values_BK, indices=indices_BK, offset=zero_B1, scale=zero_B1 + 1)
    )


def truncation(
    sae,
    blocks: Iterable[np.ndarray],
    *,
    shards: Sequence[int],
    topk: Mapping[str, TopKConfig] = RULES,
    limit: int | None = None,
) -> list[Truncation]:
    """Measures what rules of capacity lose of the exact top-k of a trained autoencoder.

    The weights need not have been trained on shards: their latents are taken in the order of their
    indices, as a mesh would split them. Batches are as small as the latents are many.

    Args:
      sae: the autoencoder (`saejax.model.sae.SAE`).
      blocks: raw held-out activations `[..., D]`.
      shards: numbers of shards to simulate.
      topk: rules by name.
      limit: at most this many rows.

    Returns:
      One entry per number of shards and rule, in that order.

    Raises:
      ValueError: a number of shards that does not divide the latents, or none; no rows, or rows
        with NaN or infinity.
    """
    k, n_latents = sae.config.k, sae.config.n_latents
    if not shards or not topk:
        raise ValueError("shards: none; give at least one number of shards, and one rule")
    wanted = {
        (count, name): rule.capacity(k, n_latents, count)
        for count in shards
        for name, rule in topk.items()
    }
    settings = sorted({(count, size) for (count, _), size in wanted.items()})
    if limit is not None and limit < 2:
        raise ValueError(f"limit = {limit} tokens (--tokens) must be at least 2, or None for all")
    tokens, exact, measured = _measure(sae, blocks, settings, limit)
    return [
        Truncation(
            shards=count,
            rule=name,
            capacity=size,
            tokens=tokens,
            expected_loss=expected_loss(k, n_latents, count, size),
            lost=measured[count, size].lost / (tokens * k),
            changed=measured[count, size].changed / tokens,
            at_capacity=measured[count, size].at_capacity / (tokens * count),
            warn_above=warning_share(k, n_latents, count),
            nmse=measured[count, size].quality.nmse,
            nmse_exact=exact.nmse,
        )
        for (count, name), size in wanted.items()
    ]


def _measure(
    sae, blocks: Iterable[np.ndarray], settings: Sequence[tuple[int, int]], limit: int | None
) -> tuple[int, Reconstruction, dict[tuple[int, int], _Counts]]:
    """Tokens, the exact reconstruction, and the sums of every (shards, capacity)."""
    rows = min(max(_PRE_ACTIVATIONS // sae.config.n_latents, 1), _MOST_ROWS)
    tokens, exact = 0, Reconstruction.empty(sae.config.d_model)
    measured: dict[tuple[int, int], _Counts] = {}
    for x_BD in regroup(blocks, rows, limit):
        count = len(x_BD)
        # The last batch repeats its last row, so that every batch has one shape.
        padded_BD = jnp.asarray(np.pad(x_BD, ((0, rows - count), (0, 0)), mode="edge"))
        x_n, h_BL, indices_BK, x_hat = _encode_exactly(sae, padded_BD)
        x_n, indices_BK, x_hat = (np.asarray(a)[:count] for a in (x_n, indices_BK, x_hat))
        quality = Reconstruction.of(x_n, x_hat)
        tokens, exact = tokens + count, exact.merge(quality)
        for setting in settings:
            part = _count(sae, h_BL, indices_BK, x_n, x_hat, quality, *setting)
            before = measured.get(setting)
            measured[setting] = part if before is None else before.merge(part)
    if not tokens:
        raise ValueError("held-out activations: 0 rows; give at least 2 that differ")
    return tokens, exact, measured


def _count(
    sae, h_BL, indices_BK, x_n, x_hat, quality: Reconstruction, shards: int, capacity: int
) -> _Counts:
    """What a capacity does to one batch, whose exact selection and reconstruction are given.

    Where no shard holds more than `capacity` of a token's exact top-k, all of it is offered, and
    wins: only the other tokens are selected again.
    """
    k, n_latents = sae.config.k, sae.config.n_latents
    held_BS = _held(indices_BK, n_latents, shards)
    lost_B = np.maximum(held_BS - capacity, 0).sum(axis=1)
    full_B = (held_BS >= capacity).sum(axis=1)
    (changed,) = np.nonzero(lost_B)
    if len(changed):
        x_hat = x_hat.copy()
        for start in range(0, len(changed), _ROWS_AGAIN):
            part = changed[start : start + _ROWS_AGAIN]
            padded = np.pad(part, (0, _ROWS_AGAIN - len(part)), mode="edge")
            out = _select_again(sae, h_BL, padded, shards, capacity)
            again_RK, x_hat[part] = (np.asarray(array)[: len(part)] for array in out)
            full_B[part] = (_held(again_RK, n_latents, shards) >= capacity).sum(axis=1)
        quality = Reconstruction.of(x_n, x_hat)
    return _Counts(
        lost=int(lost_B.sum()),
        changed=len(changed),
        at_capacity=int(full_B.sum()) if capacity < exact_capacity(k, n_latents, shards) else 0,
        quality=quality,
    )


def _held(indices_BK: np.ndarray, n_latents: int, shards: int) -> np.ndarray:
    """How many of each token's latents `[B, S]` every shard holds."""
    n_tokens = len(indices_BK)
    pair_BK = np.arange(n_tokens)[:, None] * shards + indices_BK // (n_latents // shards)
    return np.bincount(pair_BK.ravel(), minlength=n_tokens * shards).reshape(n_tokens, shards)


def format_table(measured: Sequence[Truncation]) -> str:
    """The measurements as a plain-text table, for the terminal."""
    heads = (
        "shards",
        "rule",
        "capacity",
        "expected",
        "lost",
        "tokens hit",
        "at capacity",
        "warn above",
    )
    lines = [
        f"{measured[0].tokens:,} held-out tokens, exact NMSE {measured[0].nmse_exact:.6f}",
        "",
        "".join(f"{head:>12}" for head in (*heads, "NMSE", "change")),
    ]
    for one in measured:
        shares = (one.expected_loss, one.lost, one.changed, one.at_capacity, one.warn_above)
        cells = (
            str(one.shards),
            one.rule,
            str(one.capacity),
            *(f"{share:.2e}" if share else "0" for share in shares),
            f"{one.nmse:.6f}",
            f"{one.nmse_change:+.4%}",
        )
        lines.append("".join(f"{cell:>12}" for cell in cells))
    lines += [
        "",
        "expected, lost: share of the exact top-k that a shard's capacity cuts, by the formula for",
        "latents placed at random and as measured; tokens hit: share whose selection changes; at",
        "capacity: share of (token, shard) pairs that may have been cut; training warns above the",
        "share beside it; change: of the NMSE, relative to the exact selection",
    ]
    return "\n".join(lines)
