"""Which documents are held out, and which are taken under a limit: by the hash of their names."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

Split = Literal["train", "held_out"]
OVER_LIMIT = "documents_over_limit"
_IN_MEMORY = 64 << 20  # bytes of text, or tokens, kept between two passes to save the second


def hash_fraction(name: str) -> float:
    """A number in [0, 1) fixed by the name: the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def held_out(fractions: np.ndarray, percent: float) -> np.ndarray:
    """bool [N]: the documents with the lowest `percent` of all possible hashes.

    Of two documents or more at least one is held out (when percent > 0) and at least one is not.

    Args:
      fractions: float64 [N], `hash_fraction` of the names.
      percent: 0 <= percent < 100.
    """
    held = fractions < percent / 100
    if percent > 0 and len(held) > 1:
        held[fractions.argmin()] = True
        held[fractions.argmax()] = False
    return held


def fill(
    fractions: np.ndarray, sizes: np.ndarray, max_size: int | None, max_documents: int | None
) -> np.ndarray:
    """bool [N]: whole documents, in the order of their hash, taken while they fit.

    Args:
      fractions: float64 [N].
      sizes: int64 [N], in the unit of `max_size` (bytes of text, or tokens).
      max_size: most that all taken documents may have together, or None.
      max_documents: most documents, or None.
    """
    order = np.argsort(fractions, kind="stable")
    taken = np.zeros(len(sizes), bool)
    if max_size is None:
        taken[order[:max_documents]] = True
        return taken
    left, count, smallest = max_size, 0, int(sizes.min()) if len(sizes) else 0
    for index in order:
        if left < smallest or count == max_documents:
            break
        if sizes[index] <= left:
            taken[index] = True
            left -= int(sizes[index])
            count += 1
    return taken


def check_split(cfg: Any, label: str, *limits: str) -> None:
    """Refuses settings of splitting that are out of range.

    Raises:
      ValueError: names the field.
    """
    if not 0 <= cfg.held_out_percent < 100:
        raise ValueError(
            f"{label}.held_out_percent = {cfg.held_out_percent}: allowed are 0 <= percent < 100"
        )
    for field in limits:
        value = getattr(cfg, field)
        if value is not None and value < 1:
            raise ValueError(f"{label}.{field} = {value}: give a positive number or None")


def check(cfg: Any, label: str, *limits: str) -> None:
    """Refuses settings of splitting and packing that are out of range; see `check_split`."""
    check_split(cfg, label, *limits)
    if cfg.min_tail < 1:
        raise ValueError(f"{label}.min_tail = {cfg.min_tail}: give a positive number")
    choices = {
        "bos": ("auto", "none", "document", "context"),
        "tails": ("drop", "pad"),
        "take": ("auto", "sample", "first"),
    }
    for field, allowed in choices.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"{label}.{field} = {getattr(cfg, field)!r}: allowed are {', '.join(allowed)}"
            )


class SplitReader:
    """The documents of one split of a source; each iteration reads them anew, few at a time.

    Two ways. 'sample' takes whole documents in the order of their hash while they fit the limits;
    a first pass finds them. Of two documents or more at least one is in 'train' and, when
    held_out_percent is above 0, at least one in 'held_out'. 'first' takes documents in reading
    order, up to the first that does not fit, and reads nothing after it; the hash alone says what
    is held out.

    Attributes:
      cfg: the configuration: `source`, `held_out_percent`, `max_documents` and the limit of size.
      split: the split.
      first: whether it is taken from the start.
      left_out: what the last iteration left out by rule.
    """

    first = False

    def __init__(self, cfg: Any, split: Split, *, label: str, limit: str):
        """Reads nothing yet.

        Args:
          cfg: the configuration.
          split: 'train' or 'held_out'.
          label: its name in messages.
          limit: its field with the limit of size.

        Raises:
          ValueError: no such split.
        """
        if split not in ("train", "held_out"):
            raise ValueError(f"split = {split!r}: allowed are 'train' and 'held_out'")
        self.cfg, self.split = cfg, split
        self.left_out: Counter[str] = Counter()
        self._label, self._limit = label, limit
        self._max_size: int | None = getattr(cfg, limit)

    def read(self, left_out: Counter[str]) -> Iterator[Any]:
        """All documents of both splits; counts what is left out."""
        raise NotImplementedError

    def size(self, document: Any) -> int:
        """Size of a document in the unit of the limit."""
        raise NotImplementedError

    def nothing(self) -> str:
        """What to say when there is no document at all."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        """Reads the split.

        Raises:
          FileNotFoundError, ValueError: bad input, or an empty split.
        """
        self.left_out.clear()
        return self._first() if self.first else self._sample()

    def _sample(self) -> Iterator[Any]:
        fractions, sizes, total = array("d"), array("q"), 0
        held: list[Any] = []
        for document in self.read(self.left_out):
            fractions.append(hash_fraction(document.name))
            sizes.append(self.size(document))
            total += sizes[-1]
            if total <= _IN_MEMORY:
                held.append(document)
        if not sizes:
            raise ValueError(f"{self._told()} {self.nothing()}")
        chosen = self._chosen(np.array(fractions), np.array(sizes))
        if len(held) < len(sizes):
            held.clear()
        seen = 0
        for document in held or self.read(Counter()):
            if seen == len(sizes) or hash_fraction(document.name) != fractions[seen]:
                raise self._changed()
            if chosen[seen]:
                yield document
            seen += 1
        if seen < len(sizes):
            raise self._changed()

    def _chosen(self, fractions: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        cfg = self.cfg
        ours = held_out(fractions, cfg.held_out_percent) == (self.split == "held_out")
        where = np.flatnonzero(ours)
        if not len(where):
            raise self._empty(f"has {len(sizes)} document(s)")
        taken = fill(fractions[where], sizes[where], self._max_size, cfg.max_documents)
        if not taken.any():
            raise self._too_small("smallest", int(sizes[where].min()))
        if not taken.all():
            self.left_out[OVER_LIMIT] += int((~taken).sum())
        chosen = np.zeros(len(sizes), bool)
        chosen[where[taken]] = True
        return chosen

    def _first(self) -> Iterator[Any]:
        cfg, count, size, seen = self.cfg, 0, 0, 0
        for document in self.read(self.left_out):
            seen += 1
            held = hash_fraction(document.name) < cfg.held_out_percent / 100
            if held != (self.split == "held_out"):
                continue
            size += self.size(document)
            over = self._max_size is not None and size > self._max_size
            if over and not count:
                raise self._too_small("first", size)
            if over or count == cfg.max_documents:
                self.left_out[OVER_LIMIT] += 1  # at least; what follows is not read
                return
            yield document
            count += 1
        if not count:
            raise self._empty(f"has {seen} document(s), split by hash alone,")

    def _told(self) -> str:
        return f"{self._label}.source = {self.cfg.source!r}"

    def _empty(self, found: str) -> ValueError:
        return ValueError(
            f"{self._told()} {found} and {self._label}.held_out_percent = "
            f"{self.cfg.held_out_percent}, which leaves the {self.split} split empty; give more "
            "text (a file, or at least two), or a percentage above 0"
        )

    def _too_small(self, which: str, size: int) -> ValueError:
        return ValueError(
            f"{self._label}.{self._limit} = {self._max_size} is less than the {which} document of "
            f"the {self.split} split: give at least {size}"
        )

    def _changed(self) -> ValueError:
        return ValueError(f"{self._told()} changed while it was being read; start again")
