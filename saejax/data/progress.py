"""Signs of life of a long reading: what was read and packed so far, in a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

EVERY_SECONDS = 10.0

Log = Callable[[str], None]


class Progress:
    """Counts documents as they go by; the same of one that is read in two passes."""

    def __init__(self, log: Log | None, what: str, clock: Callable[[], float] = time.monotonic):
        """Begins.

        Args:
          log: takes a line; None for none.
          what: what is read, for the line.
          clock: seconds.
        """
        self._log, self._what, self._clock = log, what, clock
        self._logged = self._began = clock()
        self._read = self._packed = self._tokens = self._bytes = 0

    def reading(self, documents: Iterable[Any]) -> Iterator[Any]:
        """The same documents, counted as read; a further pass begins at 0."""
        self._read, self._began = 0, self._clock()
        for document in documents:
            self._read += 1
            self._tick()
            yield document

    def packing(self, documents: Iterable[Any]) -> Iterator[Any]:
        """The same documents of ids, counted as packed, with their tokens and bytes of text."""
        for document in documents:
            yield document
            self._packed += 1
            self._tokens += len(document.ids)
            self._bytes += max(0, document.n_bytes)  # -1: never was text here
            self._tick()

    def _tick(self) -> None:
        now = self._clock()
        if self._log is None or now - self._logged < EVERY_SECONDS:
            return
        self._logged = now
        line = f"{self._what}: {self._read:,} documents read"
        if self._packed:
            rate = self._tokens / max(now - self._began, 1e-9)
            text = f", {self._bytes / 1e6:,.1f} MB of text" if self._bytes else ""
            line += (
                f", {self._packed:,} packed{text}, {self._tokens:,} tokens, {rate:,.0f} a second"
            )
        self._log(line)
