"""Which rows of a batch a process reads, and how they reach its devices.

A batch `[B, D]` is split by rows over every device of the mesh. The rows of one process's devices
need not be neighbours, because the mesh follows the interconnect: they are a few ranges of the
batch, and a source produces only those.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

Ranges = Sequence[tuple[int, int]]
"""Rows of a batch: ascending, disjoint (first, last + 1)."""


class Provenance(NamedTuple):
    """Where every row of a batch is from: int64 `[B]` each.

    Attributes:
      context: number of the context in the text as it was packed (row of `tokens.Contexts`).
      document: number of the document.
      position: of the token in its context.
    """

    context: np.ndarray
    document: np.ndarray
    position: np.ndarray


class Feed:
    """The way of a batch from this process's memory to its devices.

    Attributes:
      ranges: the rows of each batch that this process's devices hold, hence all it has to read.
    """

    def __init__(self, sharding: NamedSharding, batch_size: int):
        """Looks up whose rows are whose.

        Args:
          sharding: of a batch: rows are split, columns are not.
          batch_size: B, rows of a batch over the whole mesh.
        """
        self._sharding = sharding
        self._batch_size = batch_size
        held = sharding.addressable_devices_indices_map((batch_size, 1))
        spans = {device: rows.indices(batch_size)[:2] for device, (rows, _) in held.items()}
        self.ranges: Ranges = merged(spans.values())
        starts = list(itertools.accumulate((b - a for a, b in self.ranges), initial=0))
        self._n_rows = starts[-1]
        self._places = []  # (device, its rows among those that this process reads)
        for device, (first, last) in spans.items():
            at = next(i for i, (a, b) in enumerate(self.ranges) if a <= first < b)
            offset = starts[at] + first - self.ranges[at][0]
            self._places.append((device, slice(offset, offset + last - first)))

    def place(self, rows_bD: np.ndarray | jax.Array) -> jax.Array:
        """Starts the transfer of this process's rows, and returns the whole batch `[B, D]`.

        Args:
          rows_bD: the rows of `ranges`, one after the other; or a whole batch that is on the
            devices already, which is returned as it is.

        Raises:
          ValueError: there are more or fewer of them.
        """
        on_devices = isinstance(rows_bD, jax.Array)
        if on_devices and rows_bD.sharding.is_equivalent_to(self._sharding, rows_bD.ndim):
            return rows_bD
        if len(rows_bD) != self._n_rows:
            raise ValueError(
                f"{len(rows_bD)} rows were given for a batch of which this process holds "
                f"{self._n_rows}; give those of Feed.ranges"
            )
        parts = [rows_bD[rows] for _, rows in self._places]
        parts = jax.device_put(parts, [device for device, _ in self._places])
        shape = (self._batch_size, rows_bD.shape[1])
        return jax.make_array_from_single_device_arrays(shape, self._sharding, parts)


def merged(spans) -> Ranges:
    """The same rows as ascending ranges that neither overlap nor touch."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if result and first <= result[-1][1]:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return tuple(result)


def check_ranges(ranges: Ranges | None, batch_size: int) -> Ranges:
    """The ranges, or the whole batch for None.

    Raises:
      ValueError: they are no ascending, disjoint rows of a batch.
    """
    if ranges is None:
        return ((0, batch_size),)
    ends = [0, *itertools.chain.from_iterable(ranges), batch_size]
    if not ranges or ends != sorted(ends) or any(a == b for a, b in ranges):
        raise ValueError(
            f"ranges = {tuple(ranges)} must be ascending, disjoint (first, last + 1) rows of a "
            f"batch of {batch_size}"
        )
    return ranges


def take(rows: np.ndarray, ranges: Ranges) -> np.ndarray:
    """The rows of these ranges; no copy of one range."""
    parts = [rows[first:last] for first, last in ranges]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
