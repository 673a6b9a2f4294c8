"""Activations held in memory, behind the interface of `Loader`: for notebooks and small studies."""

import hashlib
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from saejax.data.feed import Ranges, check_ranges, take

_PERMUTATION = 0


class ArraySource:
    """Batches of an array `[N, D]`, shuffled anew each epoch; batch `step` depends on seed alone.

    Attributes:
      d_model: D.
      batch_size: rows of a batch.
      fingerprint: digest of shape, dtype and bytes.
    """

    def __init__(self, rows_ND: np.ndarray, batch_size: int, seed: int = 0):
        """Keeps a reference to the rows.

        Raises:
          ValueError: not a matrix of floats, fewer rows than a batch, or non-finite values.
        """
        if rows_ND.ndim != 2:
            raise ValueError(
                f"activations of shape {rows_ND.shape} must be a matrix [N, D]; reshape(-1, D) "
                f"makes one"
            )
        if not jnp.issubdtype(rows_ND.dtype, jnp.floating):
            raise ValueError(
                f"activations of dtype {rows_ND.dtype} must be floating-point; convert them with "
                f"astype('float32')"
            )
        if len(rows_ND) < batch_size:
            raise ValueError(
                f"{len(rows_ND)} activations are fewer than batch_size = {batch_size}; lower "
                f"batch_size or give more rows"
            )
        refuse_non_finite(rows_ND)
        self._rows = rows_ND
        self._seed = seed
        self.batch_size = batch_size
        self.d_model = rows_ND.shape[1]
        header = f"{rows_ND.dtype.name}{rows_ND.shape}".encode()
        digest = hashlib.sha256(header + np.ascontiguousarray(rows_ND).tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def tokens_per_epoch(self) -> int:
        """Rows that an epoch visits: whole batches."""
        return len(self._rows) // self.batch_size * self.batch_size

    def batch(self, step: int, ranges: Ranges | None = None) -> np.ndarray:
        """The rows `ranges` of batch `step`, all by default: `[b, D]`; only those are copied.

        The tail of an epoch that fills no batch is left.
        """
        per_epoch = len(self._rows) // self.batch_size
        epoch, place = divmod(step, per_epoch)
        if self._order[0] != epoch:
            seed = np.random.SeedSequence((self._seed, _PERMUTATION, epoch))
            order = np.random.Generator(np.random.Philox(seed)).permutation(len(self._rows))
            self._order = (epoch, order)
        picked = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return self._rows[take(picked, check_ranges(ranges, self.batch_size))]

    def iterate(self, start_step: int = 0, ranges: Ranges | None = None) -> Iterator[np.ndarray]:
        """Batches from `start_step` on, without end."""
        step = start_step
        while True:
            yield self.batch(step, ranges)
            step += 1

    def sample_rows(self, n: int) -> np.ndarray:
        """The first n rows of the stream."""
        steps = -(-n // self.batch_size)
        return np.concatenate([self.batch(step) for step in range(steps)])[:n]


def refuse_non_finite(rows: np.ndarray) -> None:
    """Raises ValueError with the count and the first row if any value is NaN or infinite."""
    with np.errstate(over="ignore"):  # training is in float32: what overflows it is refused too
        bad = ~np.isfinite(np.asarray(rows, np.float32)).all(axis=-1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(rows)} activations hold NaN or infinity, the first at row "
            f"{int(bad.argmax())}; remove them before training"
        )
