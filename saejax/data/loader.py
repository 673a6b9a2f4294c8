"""Batches of stored activations: a batch is a pure function of (seed, step).

The stream of training rows is the concatenation of epochs. An epoch holds every chunk of the store
once, in an order drawn for (seed, epoch): rounds over all shards, each in a new order and giving
another of its chunks, so that the chunks of one batch come from different shards wherever there
are enough. Batch `step` is the rows [step * B, (step + 1) * B) of that stream; a process asks for
the ranges of it that its devices hold. So the only state is the step, whatever the number of
processes.
"""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from saejax.data.feed import Provenance, Ranges, check_ranges
from saejax.data.layout import CHUNK_STREAM, SHARD_STREAM, permutation, random_keys
from saejax.data.pending import Pending
from saejax.data.recent import Recent
from saejax.data.shards import Store

_SHARDS_KEPT = 256
_ORDERS_KEPT = 2  # the end of an epoch and the beginning of the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How stored activations are drawn.

    Attributes:
      seed: seed of the order of chunks; each epoch has an order of its own.
      prefetch: batches read ahead by `Loader.iterate`.
    """

    seed: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Loader.seed = {self.seed}: must be in [0, 2**63).")
        if self.prefetch < 0:
            raise ValueError(f"Loader.prefetch = {self.prefetch}: must be 0 or more.")


class Loader:
    """Batches of raw rows from a complete store; nothing is normalised.

    Attributes:
      store: the store.
      batch_size: rows of a global batch, B.
      d_model: width of the rows.
      tokens_per_epoch: rows of the store.
      wait_seconds: time that `iterate` has spent waiting for the disk.
    """

    def __init__(self, store: Store, batch_size: int, cfg: LoaderConfig | None = None) -> None:
        """Opens a loader.

        Raises:
          ValueError: the store is unfinished; the batch size is no multiple or divisor of the
            store's contexts_per_shard.
        """
        check_batch_size(batch_size, store.spec.contexts_per_shard)
        store.require_complete()
        self.store = store
        self.batch_size = batch_size
        self.d_model = store.spec.d_model
        self.tokens_per_epoch = store.n_rows
        self.wait_seconds = 0.0
        self._cfg = cfg or LoaderConfig()
        self._orders: Recent[int, np.ndarray] = Recent(_ORDERS_KEPT)
        self._of_shard: Recent[int, np.ndarray] = Recent(_SHARDS_KEPT)
        self._recent: Recent[tuple[int, int], Pending] = Recent(self._cfg.prefetch + 2)

    def batch(self, step: int, ranges: Ranges | None = None) -> np.ndarray:
        """The rows `ranges` of batch `step`, all by default: bfloat16 [b, D]; only those are read.

        Raises:
          ValueError: the ranges are no rows of a batch.
        """
        return _rows(self._start(step, ranges))

    def next(self, state: int, ranges: Ranges | None = None) -> tuple[np.ndarray, Provenance, int]:
        """The batch of a state, where its rows are from, and the state after it.

        `SiteBatches.next` is the same of a stream. `iterate` also reads ahead.

        Args:
          state: 0, or what an earlier call returned, in whatever process: a number.
          ranges: rows of the batch, all by default; only those are read.

        Returns:
          rows bfloat16 `[b, D]`, provenance of these, and the next state.
        """
        reads = self._start(state, ranges)
        shard_b, row_b, position_b = self.provenance(state, ranges).T
        context_b, document_b = np.empty((2, len(shard_b)), np.int64)
        for shard in np.unique(shard_b):
            here = shard_b == shard
            context_b[here], document_b[here] = self._origins(int(shard))[row_b[here]].T
        return _rows(reads), Provenance(context_b, document_b, position_b), state + 1

    def provenance(self, step: int, ranges: Ranges | None = None) -> np.ndarray:
        """int64 [b, 3]: shard, context and token position of each row of `batch(step, ranges)`.

        The context is a row of `store.read_contexts(shard)`.
        """
        parts = []
        for shard, chunk, start, stop in self._pieces(step, ranges):
            part = np.empty((stop - start, 3), np.int64)
            part[:, 0] = shard
            context, position = self.store.where(shard, chunk)
            part[:, 1], part[:, 2] = context[start:stop], position[start:stop]
            parts.append(part)
        return np.concatenate(parts)

    def iterate(
        self, start_step: int = 0, stop_step: int | None = None, ranges: Ranges | None = None
    ) -> Iterator[np.ndarray]:
        """Batches from `start_step` on, read ahead; without end unless `stop_step` is given."""
        pending: collections.deque = collections.deque()
        ahead = start_step
        while True:
            while len(pending) <= self._cfg.prefetch and (stop_step is None or ahead < stop_step):
                pending.append(self._start(ahead, ranges))
                ahead += 1
            if not pending:
                return
            began = time.perf_counter()
            rows = _rows(pending.popleft())
            self.wait_seconds += time.perf_counter() - began
            yield rows

    def sample_rows(self, n: int) -> np.ndarray:
        """bfloat16 [n, D] for statistics: the first n rows of the stream, in every process alike.

        Raises:
          ValueError: the store has fewer than n rows.
        """
        if not 0 < n <= self.tokens_per_epoch:
            raise ValueError(
                f"sample of {n} rows: the store at {self.store.path} has {self.tokens_per_epoch}; "
                "ask for at least 1 and at most that many."
            )
        pieces = self._stream(0, n)
        return _rows([(self.store.read_chunk(s, c), a, b) for s, c, a, b in pieces])

    def _pieces(self, step: int, ranges: Ranges | None) -> Iterator[tuple[int, int, int, int]]:
        if step < 0:
            raise ValueError(f"step = {step}: must be 0 or more.")
        first = step * self.batch_size
        for start, stop in check_ranges(ranges, self.batch_size):
            yield from self._stream(first + start, first + stop)

    def _stream(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(shard, chunk, first slot, last slot + 1) of the rows [start, stop) of the stream."""
        spec = self.store.spec
        n = spec.contexts_per_shard
        per_batch = max(1, self.batch_size // n)
        per_epoch = self.tokens_per_epoch // n
        while start < stop:
            index, slot = divmod(start, n)
            epoch, place = divmod(index, per_epoch)
            order = self._order(epoch, per_batch)
            end = min(n, slot + stop - start)
            shard, chunk = order[place]
            yield int(shard), int(chunk), slot, end
            start += end - slot

    def _order(self, epoch: int, per_batch: int) -> np.ndarray:
        chunks, seed = self.store.chunks, self._cfg.seed
        return self._orders.get(epoch, lambda: chunk_order(chunks, per_batch, seed, epoch))

    def _origins(self, shard: int) -> np.ndarray:
        """uint32 `[C, 2]`: context and document of each row of `store.read_contexts(shard)`."""
        return self._of_shard.get(shard, lambda: self.store.read_contexts(shard)[:, :2].copy())

    def _start(self, step: int, ranges: Ranges | None) -> list[tuple[Pending, int, int]]:
        return [(self._read(s, c, b - a), a, b) for s, c, a, b in self._pieces(step, ranges)]

    def _read(self, shard: int, chunk: int, rows: int) -> Pending:
        if rows == self.store.spec.contexts_per_shard:
            return self.store.read_chunk(shard, chunk)
        # Other batches, or other ranges of this one, want the rest: keep the latest chunks.
        return self._recent.get((shard, chunk), lambda: self.store.read_chunk(shard, chunk))


def check_batch_size(batch_size: int, contexts_per_shard: int) -> None:
    """ValueError unless whole batches can be made of chunks of `contexts_per_shard` rows."""
    n = contexts_per_shard
    if batch_size < 1 or (batch_size % n and n % batch_size):
        below = [size for size in range(1, n) if n % size == 0]
        raise ValueError(
            f"batch_size = {batch_size}: the store's chunks hold {n} rows (contexts_per_shard), so "
            f"a batch must be a multiple of {n}, or one of {below}."
        )


def chunk_order(chunks: Sequence[int], per_batch: int, seed: int, epoch: int) -> np.ndarray:
    """int32 [sum(chunks), 2]: (shard, chunk) in the order of one epoch.

    Every pair occurs once. The `per_batch` chunks of a batch are of different shards when there
    are that many shards (but for the batch across the end of an epoch), otherwise as evenly as
    possible of all. A shard with fewer chunks than the longest sits out rounds all over the epoch.

    Args:
      chunks: how many each shard has.
      per_batch: chunks of a batch.
      seed, epoch: what is drawn for.
    """
    n_shards, rounds, count_S = len(chunks), int(max(chunks)), np.asarray(chunks)
    chunk_SR = np.argsort(
        random_keys((n_shards, rounds), seed, CHUNK_STREAM, epoch), axis=1, kind="stable"
    )
    parts, last = [], np.empty(0, np.int64)
    done = epoch * int(count_S.sum())
    for turn in range(rounds):
        shards = permutation(n_shards, seed, SHARD_STREAM, epoch * rounds + turn)
        shards = shards[chunk_SR[shards, turn] < count_S[shards]]
        begun = done % per_batch  # chunks that the open batch has
        if turn and begun and per_batch <= len(shards):
            taken = np.isin(shards, last[-begun:])
            first = shards[~taken][: per_batch - begun]
            shards = np.concatenate([first, shards[~np.isin(shards, first)]])
        parts.append(np.stack([shards, chunk_SR[shards, turn]], axis=1))
        done += len(shards)
        last = np.concatenate([last, shards])[-per_batch:]
    order = np.concatenate(parts).astype(np.int32)
    order.flags.writeable = False
    return order


def _rows(parts: list[tuple[Pending, int, int]]) -> np.ndarray:
    rows = [read.result()[start:stop] for read, start, stop in parts]
    if len(rows) == 1:
        return rows[0]
    return np.concatenate([part.view(np.uint16) for part in rows]).view(ml_dtypes.bfloat16)
