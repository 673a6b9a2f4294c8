"""Top activating contexts of chosen latents: exact, mergeable, independent of order.

A context's score for a latent is the largest value of the latent in it; each context counts once.
Ties go to the lowest context id, so any split of the contexts over shards, hosts or calls, merged
in any order, gives the same examples. Sums over all latents are in ``evals.metrics``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from saejax.evals.metrics import LatentStatistics

EMPTY = -1
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextBlock:
    """Contexts with their activations, whole.

    Attributes:
      rows: raw activations ``[C, R, D]``; the last R of each context's T positions.
      stored: ``[C, R]``, whether there is an activation; where not (masked: BOS, padding, outlying
        norms) the row is zeros and no latent counts as active. None: everywhere.
      tokens: token ids ``[C, T]``.
      document: document number ``[C]``, an index into the names of the text.
      offset: index of the context's first token in its document ``[C]``.
      ids: context ids ``[C]``, unique over all blocks; the lowest wins a tie.
    """

    rows: np.ndarray
    tokens: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    ids: np.ndarray
    stored: np.ndarray | None = None

    def stored_rows(self) -> np.ndarray:
        """The activations alone: ``[C, R, D]`` where all are stored, otherwise ``[N, D]``."""
        whole = self.stored is None or self.stored.all()
        return self.rows if whole else self.rows[self.stored]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopExamples:
    """The N best contexts of each of S latents, best first.

    Attributes:
      latents: int64 ``[S]``, the latents' indices, ascending.
      score: float32 ``[S, N]``, largest value in the context; 0 in empty slots.
      ids: int64 ``[S, N]``, context ids; ``EMPTY`` in empty slots.
      values: float32 ``[S, N, T]``, the latent's value at every token; 0 where it is not active
        and at the positions before the first stored one.
      tokens: int64 ``[S, N, T]``; document, offset: int64 ``[S, N]``.
      contexts: number of contexts seen.
    """

    latents: np.ndarray
    score: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    tokens: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    contexts: int

    @classmethod
    def empty(cls, latents: np.ndarray, top: int, length: int) -> TopExamples:
        """No contexts seen: ``top`` empty slots for each latent, contexts of ``length`` tokens."""
        latents = np.unique(np.asarray(latents, np.int64))
        slots = (len(latents), top)
        return cls(
            latents=latents,
            score=np.zeros(slots, np.float32),
            ids=np.full(slots, EMPTY, np.int64),
            values=np.zeros((*slots, length), np.float32),
            tokens=np.zeros((*slots, length), np.int64),
            document=np.full(slots, EMPTY, np.int64),
            offset=np.zeros(slots, np.int64),
            contexts=0,
        )

    def merge(self, other: TopExamples) -> TopExamples:
        """The best N contexts of both; associative and commutative.

        Raises:
          ValueError: other latents, sizes, or a context id that both sides saw.
        """
        if self.values.shape != other.values.shape or (self.latents != other.latents).any():
            raise ValueError(
                f"examples: {self.values.shape} and {other.values.shape}; allowed: equal latents, "
                "top and context length; merge summaries of one run only"
            )
        joined = {
            name: np.concatenate([getattr(self, name), getattr(other, name)], axis=1)
            for name in ("score", "ids", "values", "tokens", "document", "offset")
        }
        _refuse_twice(joined["ids"])
        return _best(joined, self.latents, self.ids.shape[1], self.contexts + other.contexts)

    def of_latent(self, latent: int) -> range:
        """The slots of one latent that hold an example."""
        return range(int((self.ids[self.row(latent)] != EMPTY).sum()))

    def row(self, latent: int) -> int:
        """Row of a latent in the arrays; ValueError when it is not among them."""
        found = np.flatnonzero(self.latents == latent)
        if not len(found):
            raise ValueError(f"latent: {latent}; allowed: {self.latents.tolist()}")
        return int(found[0])


def _refuse_twice(ids_SN: np.ndarray) -> None:
    ordered_SN = np.sort(ids_SN, axis=1)
    twice = (ordered_SN[:, 1:] == ordered_SN[:, :-1]) & (ordered_SN[:, 1:] != EMPTY)
    if twice.any():
        raise ValueError(
            f"context id: {int(ordered_SN[:, 1:][twice][0])} occurs twice; allowed: unique ids; "
            "merge summaries of disjoint contexts"
        )


def _best(
    joined: dict[str, np.ndarray], latents: np.ndarray, top: int, contexts: int
) -> TopExamples:
    empty_SN = joined["ids"] == EMPTY
    # lexsort's last key is the first to decide: full slots, then score, then the lowest id.
    order_SN = np.lexsort((joined["ids"], -joined["score"], empty_SN), axis=1)[:, :top]
    chosen = {
        name: np.take_along_axis(
            value, order_SN.reshape(*order_SN.shape, *(1,) * (value.ndim - 2)), axis=1
        )
        for name, value in joined.items()
    }
    return TopExamples(latents=latents, contexts=contexts, **chosen)


def _examples_of(block: ContextBlock, value_SCR: np.ndarray, empty: TopExamples) -> TopExamples:
    """The best contexts of one block, from the latents' values at every stored position."""
    top, length = empty.values.shape[1:]
    score_SC = value_SCR.max(axis=2)
    ids_C = np.asarray(block.ids, np.int64)
    order_SC = np.lexsort((np.broadcast_to(ids_C, score_SC.shape), -score_SC), axis=1)
    pick_SN = order_SC[:, :top]
    score_SN = np.take_along_axis(score_SC, pick_SN, axis=1)
    live_SN = score_SN > 0
    values_SNR = np.take_along_axis(value_SCR, pick_SN[..., None], axis=1)
    before = np.zeros((*pick_SN.shape, length - values_SNR.shape[2]), np.float32)

    def at(array: np.ndarray, blank: int) -> np.ndarray:
        taken = np.asarray(array, np.int64)[pick_SN]
        return np.where(live_SN.reshape(*live_SN.shape, *(1,) * (taken.ndim - 2)), taken, blank)

    found = {
        "score": np.where(live_SN, score_SN, 0).astype(np.float32),
        "ids": at(ids_C, EMPTY),
        "values": np.concatenate([before, values_SNR], axis=2) * live_SN[..., None],
        "tokens": at(block.tokens, 0),
        "document": at(block.document, EMPTY),
        "offset": at(block.offset, 0),
    }
    joined = {
        name: np.concatenate([getattr(empty, name), value.astype(getattr(empty, name).dtype)], 1)
        for name, value in found.items()
    }
    return _best(joined, empty.latents, top, len(block.ids))


@partial(jax.jit, static_argnames="chosen")
def _chosen_values(sae, rows_CRD, slot_L, chosen):
    """Values of the chosen latents ``[S, C, R]``, zero where they are not active."""
    latents = sae.encode(rows_CRD.astype(jnp.float32))
    slot_CRK = slot_L[latents.indices]
    hit_SCRK = slot_CRK[None] == jnp.arange(chosen)[:, None, None, None]
    # At most one of the K is the latent: the sum is its value.
    return jnp.where(hit_SCRK, latents.values[None], 0.0).sum(axis=-1)


def _pieces(block: ContextBlock) -> Iterable[ContextBlock]:
    """The block in slices whose pre-activations fit a device, whatever the shards' size."""
    contexts, rows = block.rows.shape[:2]
    size = max(1, _ROWS_AT_ONCE // rows)
    for start in range(0, contexts, size):
        part = slice(start, start + size)
        yield ContextBlock(
            rows=block.rows[part],
            tokens=block.tokens[part],
            document=block.document[part],
            offset=block.offset[part],
            ids=block.ids[part],
            stored=None if block.stored is None else block.stored[part],
        )


def top_examples(
    sae, blocks: Iterable[ContextBlock], latents: np.ndarray, top: int = 8
) -> TopExamples:
    """The ``top`` contexts that activate each of some latents most, in one pass.

    Args:
      sae: the autoencoder (``saejax.model.sae.SAE``).
      blocks: whole contexts with their raw activations.
      latents: indices of the latents to keep examples of; a few dozen to a few hundred.
      top: contexts to keep for each.

    Raises:
      ValueError: no contexts, a latent outside the dictionary, or a context id seen twice.
    """
    latents = np.unique(np.asarray(latents, np.int64))
    n_latents = sae.config.n_latents
    if not latents.size or latents[0] < 0 or latents[-1] >= n_latents or top < 1:
        raise ValueError(
            f"latents, top: {latents.tolist()}, {top}; allowed: at least one latent in "
            f"0..{n_latents - 1}, top >= 1"
        )
    slot_L = np.full(n_latents, EMPTY, np.int32)
    slot_L[latents] = np.arange(len(latents))
    slot_L = jnp.asarray(slot_L)
    result: TopExamples | None = None
    for block in (piece for whole in blocks for piece in _pieces(whole)):
        value_SCR = np.asarray(_chosen_values(sae, jnp.asarray(block.rows), slot_L, len(latents)))
        if block.stored is not None:
            value_SCR = np.where(block.stored, value_SCR, 0)
        empty = TopExamples.empty(latents, top, block.tokens.shape[1])
        part = _examples_of(block, value_SCR, empty)
        result = part if result is None else result.merge(part)
    if result is None:
        raise ValueError("contexts: 0; allowed: at least 1; harvest held-out text")
    return result


def spread_over_density(statistics: LatentStatistics, count: int, seed: int) -> np.ndarray:
    """Chooses latents for show without looking at them: one at random per density quantile.

    The latents that fired are ranked by density (ties by index) and cut into ``count`` groups of
    equal size; a generator seeded with ``seed`` draws one of each. Fewer living latents than
    ``count`` are all returned.

    Returns:
      int64 ``[<= count]``, densest first.
    """
    alive = np.flatnonzero(statistics.count)
    ranked = alive[np.lexsort((alive, -statistics.count[alive]))]
    if len(ranked) <= count:
        return ranked
    generator = np.random.default_rng(seed)
    return np.array([generator.choice(group) for group in np.array_split(ranked, count)])
