"""A small deterministic trainer for byte-level byte-pair encoding (Sennrich et al. 2016)."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

from saejax.data.bpe import END_OF_TEXT, Tokenizer, _utf8, byte_symbols, split_pieces


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns a byte-level BPE: id 0 is `<|endoftext|>`, 1..256 the bytes, then the merges.

    Each step merges the most frequent pair; among equals, the one with the smaller ids. The
    result depends on the multiset of texts only.

    Args:
      texts: training texts.
      vocab_size: number of ids, at least 257. Fewer result when no pair occurs twice.

    Raises:
      ValueError: vocab_size under 257, or texts that hold no pair of bytes.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size = {vocab_size}: at least 257 (256 bytes and one special)")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split_pieces(text))
    symbols = [END_OF_TEXT, *sorted(byte_symbols())]
    merges = _learn(counts, symbols, vocab_size)
    if not merges:
        raise ValueError("texts: nothing to learn from, no pair of bytes occurs twice")
    vocab = {symbol: i for i, symbol in enumerate(symbols) if i}
    return Tokenizer(vocab, merges, {END_OF_TEXT: 0})


def _learn(counts: Counter[str], symbols: list[str], vocab_size: int) -> list[tuple[str, str]]:
    """Extends `symbols` up to vocab_size and returns the merges, in order."""
    index = {symbol: i for i, symbol in enumerate(symbols)}
    byte_id = [index[symbol] for symbol in byte_symbols()]
    words = [[byte_id[byte] for byte in _utf8(piece)] for piece in counts]
    frequency = list(counts.values())
    totals: Counter[tuple[int, int]] = Counter()
    where: dict[tuple[int, int], set[int]] = defaultdict(set)
    for number, word in enumerate(words):
        for pair in zip(word, word[1:]):
            totals[pair] += frequency[number]
            where[pair].add(number)
    queue = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(queue)
    merges = []
    while queue and len(symbols) < vocab_size:
        total, pair = heapq.heappop(queue)
        if totals[pair] != -total:  # stale: the count changed since it was pushed
            if totals[pair] > 1:
                heapq.heappush(queue, (-totals[pair], pair))
            continue
        if -total < 2:
            break
        merges.append((symbols[pair[0]], symbols[pair[1]]))
        symbols.append("".join(merges[-1]))
        changed = _replace(words, frequency, where.pop(pair), pair, len(symbols) - 1, totals, where)
        totals.pop(pair, None)
        for other in changed - {pair}:
            heapq.heappush(queue, (-totals[other], other))
    return merges


def _replace(words, frequency, numbers, pair, new, totals, where) -> set[tuple[int, int]]:
    """Merges `pair` into `new` in the named words; returns the pairs whose counts grew."""
    grown = set()
    for number in numbers:
        word, times, out, at = words[number], frequency[number], [], 0
        while at < len(word):
            if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
                out.append(new)
                at += 2
            else:
                out.append(word[at])
                at += 1
        for old in zip(word, word[1:]):
            totals[old] -= times
        for fresh in zip(out, out[1:]):
            totals[fresh] += times
            if new in fresh:
                grown.add(fresh)
                where[fresh].add(number)
        words[number] = out
    return grown
