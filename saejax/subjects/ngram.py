"""Interpolated Kneser-Ney n-gram models (Kneser & Ney 1995; Chen & Goodman 1999), as baselines.

One absolute discount per order, n1 / (n1 + 2 n2); an n-gram is packed into one int64, 12 bits a
token, so the vocabulary is at most 4,096 and n at most 5.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_BITS = 12


@dataclasses.dataclass(frozen=True)
class _Order:
    grams: np.ndarray  # sorted distinct n-grams
    counts: np.ndarray  # true counts at the highest order, continuation counts below it
    discount: float
    contexts: np.ndarray  # sorted distinct (n-1)-grams that start one
    totals: np.ndarray  # sum of counts by context
    types: np.ndarray  # number of distinct followers by context


@dataclasses.dataclass(frozen=True)
class NGram:
    """A fitted model; build it with `fit`."""

    vocab_size: int
    orders: tuple[_Order, ...]


def _pack(tokens: np.ndarray, n: int) -> np.ndarray:
    wide = tokens.astype(np.int64)
    length = len(tokens) - n + 1
    grams = np.zeros(length, np.int64)
    for i in range(n):
        grams = (grams << _BITS) | wide[i : i + length]
    return grams


def fit(tokens: np.ndarray, n: int, vocab_size: int) -> NGram:
    """Counts a token stream.

    Args:
      tokens: [N] ids below vocab_size; documents follow one another with their `<|endoftext|>`.
      n: order, 1 to 5.
      vocab_size: at most 4,096.

    Raises:
      ValueError: order or vocabulary do not fit, or the stream is shorter than n.
    """
    if not 1 <= n <= 5 or vocab_size > 1 << _BITS or len(tokens) < n:
        raise ValueError(
            f"n = {n}, vocab_size = {vocab_size}, {len(tokens)} tokens: allowed are 1 <= n <= 5, "
            f"vocab_size <= {1 << _BITS}, and at least n tokens"
        )
    tables = {n: np.unique(_pack(tokens, n), return_counts=True)}
    for order in range(n - 1, 0, -1):  # in how many contexts does each shorter n-gram occur
        shorter = tables[order + 1][0] & ((1 << (_BITS * order)) - 1)
        tables[order] = np.unique(shorter, return_counts=True)
    orders = []
    for order in range(1, n + 1):
        grams, counts = tables[order]
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if twice else 0.5
        contexts, start = np.unique(grams >> _BITS, return_index=True)
        totals = np.add.reduceat(counts, start)
        types = np.add.reduceat(np.ones_like(counts), start)
        orders.append(_Order(grams, counts, discount, contexts, totals, types))
    return NGram(vocab_size, tuple(orders))


def probabilities(model: NGram, tokens: np.ndarray) -> np.ndarray:
    """Probability of each token given those before it: [N - n + 1] float64, from token n - 1 on."""
    n = len(model.orders)
    p = np.full(len(tokens) - n + 1, 1.0 / model.vocab_size)
    for order, table in enumerate(model.orders, 1):
        grams = _pack(tokens, order)[n - order :]
        at, known = _find(table.grams, grams)
        context, seen = _find(table.contexts, grams >> _BITS)
        count = np.where(known, np.maximum(table.counts[at] - table.discount, 0), 0.0)
        backoff = table.discount * table.types[context] * p
        p = np.where(seen, (count + backoff) / table.totals[context], p)
    return p


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return at, table[at] == wanted
