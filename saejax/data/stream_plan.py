"""Which activations of a stream are in which batch: whole numbers only; see `data/stream.py`."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

from saejax.data.layout import CONTEXT_STREAM, permutation, random_keys

GROUP_STREAM, ROW_STREAM, SLOT_STREAM = 5, 6, 7
_ROUNDS_KEPT = 4
_LANES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """Which rows go where: whole numbers only.

    Attributes:
      n_contexts: of an epoch: the first so many of all, once they are permuted.
      kept: `[N]` rows that each context of the text keeps before outliers are looked for.
      lanes: parts of every batch, each with its own contexts and buffer.
      group_contexts: contexts of a lane in one forward pass.
      batch_size: rows of a batch.
      buffer_batches: batches that the buffer holds.
      seed: of all orders.
    """

    n_contexts: int
    kept: np.ndarray = dataclasses.field(repr=False)
    lanes: int
    group_contexts: int
    batch_size: int
    buffer_batches: int
    seed: int

    def __post_init__(self) -> None:
        settings = {
            "Stream.lanes": self.lanes,
            "Harvest.batch_contexts": self.group_contexts,
            "Train.batch_size": self.batch_size,
            "Stream.buffer_batches": self.buffer_batches,
        }
        for name, value in settings.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1.")
        if self.batch_size % self.lanes:
            raise ValueError(
                f"Train.batch_size = {self.batch_size} does not divide by Stream.lanes = "
                f"{self.lanes}: every lane gives the same share of a batch."
            )
        if self.n_groups < 1:
            raise ValueError(
                f"{self.n_contexts} contexts are fewer than one forward pass takes (Stream.lanes = "
                f"{self.lanes} times Harvest.batch_contexts = {self.group_contexts}); give more "
                "text, raise Harvest.tokens if it limits them, or lower one of those two."
            )
        if self.rows_per_group < 1:
            raise ValueError(
                "a group of contexts keeps no row at all: everything in it is masked (BOS, special "
                "tokens, padding). Give other text, or a larger Harvest.batch_contexts."
            )

    @property
    def n_groups(self) -> int:
        """Groups of an epoch; contexts that fill none are left out."""
        return self.n_contexts // (self.lanes * self.group_contexts)

    @property
    def rows_per_step(self) -> int:
        """Rows of a lane in every batch, b."""
        return self.batch_size // self.lanes

    @property
    def slots(self) -> int:
        """Slots of a lane's buffer, m."""
        return self.buffer_batches * self.rows_per_step

    @functools.cached_property
    def contexts(self) -> np.ndarray:
        """int32 `[n_groups, lanes, group_contexts]`: the contexts of every group."""
        shape = (self.n_groups, self.lanes, self.group_contexts)
        order = permutation(len(self.kept), self.seed, CONTEXT_STREAM)
        return order[: np.prod(shape)].reshape(shape).astype(np.int32)

    @functools.cached_property
    def rows_per_group(self) -> int:
        """Rows that every lane takes of every group, q: what the poorest of them keeps."""
        return int(self.kept[self.contexts].sum(-1).min())

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch over all lanes."""
        return self.n_groups * self.lanes * self.rows_per_group

    def group(self, number: int) -> int:
        """The group that is `number`-th of the stream, which goes through all, epoch by epoch."""
        epoch, place = divmod(number, self.n_groups)
        return int(self._group_order(epoch)[place])

    def _group_order(self, epoch: int) -> np.ndarray:
        return _permutation(self.n_groups, self.seed, GROUP_STREAM, epoch)

    def slots_of(self, step: int) -> np.ndarray:
        """int32 `[lanes, b]`: slots whose rows are the batch of a step, and are replaced in it."""
        turn, place = divmod(step, self.buffer_batches)
        b = self.rows_per_step
        return self._round(turn)[:, place * b : (place + 1) * b]

    def _round(self, turn: int) -> np.ndarray:
        return _slot_orders(self.lanes, self.slots, self.seed, turn)

    def fresh(self, step: int) -> tuple[int, int]:
        """First and last + 1 of the rows, in each lane's stream, that step puts into the buffer."""
        first = self.slots + step * self.rows_per_step
        return first, first + self.rows_per_step

    def row_of_slot(self, step: int) -> np.ndarray:
        """int64 `[lanes, m]`: which row of the lane's stream each slot holds before step `step`."""
        rows = np.tile(np.arange(self.slots), (self.lanes, 1))
        turn = step // self.buffer_batches
        for earlier in range(max(0, turn - 1) * self.buffer_batches, step):
            np.put_along_axis(rows, self.slots_of(earlier), np.arange(*self.fresh(earlier)), 1)
        return rows

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(number of the group in the stream, first, last + 1 of its rows) of rows of a lane."""
        q = self.rows_per_group
        while first < last:
            number, offset = divmod(first, q)
            end = min(q, offset + last - first)
            yield number, offset, end
            first += end - offset


@functools.lru_cache(maxsize=_ROUNDS_KEPT)
def _slot_orders(lanes: int, slots: int, seed: int, turn: int) -> np.ndarray:
    keys = random_keys((lanes, slots), seed, SLOT_STREAM, turn)
    return np.argsort(keys, axis=1, kind="stable").astype(np.int32)


@functools.lru_cache(maxsize=_ROUNDS_KEPT)
def _permutation(n: int, seed: int, stream: int, index: int) -> np.ndarray:
    return permutation(n, seed, stream, index)


def contexts_for(kept: np.ndarray, tokens: int | None, seed: int) -> int:
    """How many contexts, in their permuted order, hold so many rows; None takes all.

    Permuted first, as in a store: the text in its own order may begin with all of one kind.
    """
    if tokens is None:
        return len(kept)
    rows = kept[permutation(len(kept), seed, CONTEXT_STREAM)].cumsum()
    return min(len(kept), int(np.searchsorted(rows, tokens)) + 1)


def row_order(keep_LGT: np.ndarray, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[lanes, G * T]` the kept rows of each lane in a random order, then the others; counts.

    Rows are numbered c * T + t. The order is drawn for the place in the stream, so that the rows
    beyond those which every lane can give are others in every epoch.
    """
    keep_LP = keep_LGT.reshape(len(keep_LGT), -1)
    keys = random_keys(keep_LP.shape, seed, ROW_STREAM, number)
    order = np.lexsort((keys, ~keep_LP), axis=1)
    return order.astype(np.int32), keep_LP.sum(1, dtype=np.int32)


def lanes_for(devices: int, batch_size: int, wanted: int | None) -> int:
    """`wanted`, or a number that other devices may share too: a run may be continued on them.

    Raises:
      ValueError: the batch does not divide by the devices.
    """
    if wanted is not None:
        return wanted
    if batch_size % devices:
        raise ValueError(
            f"Train.batch_size = {batch_size} does not divide by the {devices} devices that a "
            "stream deals its lanes out to; set Stream.lanes or another batch size."
        )
    shared = math.lcm(devices, _LANES)
    return devices if batch_size % shared else shared
