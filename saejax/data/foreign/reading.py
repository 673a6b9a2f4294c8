"""The contexts of a source by number: masked, rounded, and refused where they are not sound."""

import dataclasses
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from saejax.data.foreign.interface import Block, Part
from saejax.data.layout import MASKED

_NORM = len(MASKED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """Some contexts, in the order asked for.

    Attributes:
      acts: bfloat16 [n, R, D], from the first position that is stored.
      tokens: uint32 [n, T], zeros where the source has none.
      masked: uint8 [n, T], codes of `layout.MASKED`.
      origin: int64 [n, 3], context id, document and token offset.
    """

    acts: np.ndarray
    tokens: np.ndarray
    masked: np.ndarray
    origin: np.ndarray


class Reader:
    """Reads the parts of a source under one numbering of their contexts.

    Attributes:
      count: contexts.
      length: tokens a context, T.
      width: of an activation, D.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        codes: Mapping[int, int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
          parts: of equal T and D.
          codes: token id to code of `layout.MASKED`, of tokens that are not stored.
          vocab_size: ids that there can be; None for any.
        """
        self._parts, self._codes, self._limit = parts, dict(codes or {}), vocab_size or 2**32
        self._bounds = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.count = int(self._bounds[-1])
        _, self.length, self.width = parts[0].shape

    def gather(self, ids: np.ndarray, first_position: int) -> Gathered:
        """Some contexts, from one pass over the files that hold them.

        Raises:
          ValueError: NaN or infinity that is not masked, a token id that cannot be, or a file that
            holds less than it said.
        """
        n, length, rows = len(ids), self.length, self.length - first_position
        found = Gathered(
            acts=np.empty((n, rows, self.width), ml_dtypes.bfloat16),
            tokens=np.zeros((n, length), np.uint32),
            masked=np.empty((n, length), np.uint8),
            origin=np.empty((n, 3), np.int64),
        )
        slots, done = np.argsort(ids, kind="stable"), 0
        for part, numbers, block in self._blocks(ids[slots]):
            at = slots[done : done + len(numbers)]
            done += len(numbers)
            found.masked[at] = self._masked(part, block)
            found.acts[at] = self._sound(part, numbers, block, found.masked[at], first_position)
            found.origin[at] = self._origin(part, numbers, block)
            if block.tokens is not None:
                found.tokens[at] = block.tokens
        return found

    def sound_rows(self, ratio: float) -> tuple[np.ndarray, dict[str, int]]:
        """Of a source without contexts, the rows that may be stored.

        A masked row inside of a context is left to the store. Where each row is its own context
        it would leave a hole in the only chunk of its shard, so those are looked for first.

        Args:
          ratio: rows with a norm above this multiple of the median are left out; 0 keeps them.

        Returns:
          Their numbers, ascending, and how many are left out, by reason.

        Raises:
          ValueError: as `gather`; or no row is left.
        """
        norm_N, code_N = np.empty(self.count, np.float32), np.empty(self.count, np.uint8)
        for part, ids, block in self._blocks(np.arange(self.count)):
            codes = self._masked(part, block)
            rows = self._sound(part, ids, block, codes, 0)[:, 0]
            with np.errstate(invalid="ignore", over="ignore"):  # masked ones may hold anything
                norm_N[ids] = np.linalg.norm(rows.astype(np.float32), axis=1)
            code_N[ids] = codes[:, 0]
        kept_N = code_N == 0
        median = float(np.median(norm_N[kept_N])) if ratio and kept_N.any() else 0.0
        if median > 0:
            code_N[kept_N & (norm_N > ratio * median)] = _NORM
        counts = np.bincount(code_N, minlength=_NORM + 1)
        left_out = {
            reason: int(n) for reason, n in zip((*MASKED[1:], "norm"), counts[1:], strict=True) if n
        }
        if not counts[0]:
            raise ValueError(f"{self._parts[0].path}: every row is masked ({left_out})")
        return np.flatnonzero(code_N == 0), left_out

    def _blocks(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, Block]]:
        """(part, numbers, block) of the contexts with these ascending numbers."""
        cuts = np.searchsorted(ids, self._bounds)
        for number, part in enumerate(self._parts):
            mine, done = ids[cuts[number] : cuts[number + 1]], 0
            if not len(mine):
                continue
            for block in part.read(mine - self._bounds[number]):
                yield number, mine[done : done + len(block.acts)], block
                done += len(block.acts)
            if done != len(mine):
                raise ValueError(f"{part.path} is truncated: {len(mine) - done} contexts missing")

    def _origin(self, part: int, ids: np.ndarray, block: Block) -> np.ndarray:
        if block.origin is not None:
            return block.origin
        offset = (ids - self._bounds[part]) * self.length
        return np.stack([ids, np.full_like(ids, part), offset], axis=1)

    def _masked(self, part: int, block: Block) -> np.ndarray:
        """uint8 [n, T] codes: the format's, and those of the tokens to be left out."""
        codes = np.zeros(block.acts.shape[:2], np.uint8)
        if block.masked is not None:
            codes[:] = block.masked
        if block.tokens is None:
            return codes
        low, high = int(block.tokens.min()), int(block.tokens.max())
        if low < 0 or high >= self._limit:
            raise ValueError(
                f"{self._parts[part].path}: token id {low if low < 0 else high} is outside of "
                f"0 .. {self._limit - 1}; these are tokens of another model"
            )
        for token, code in self._codes.items():
            codes[(codes == 0) & (block.tokens == token)] = code
        return codes

    def _sound(
        self, part: int, ids: np.ndarray, block: Block, codes: np.ndarray, first: int
    ) -> np.ndarray:
        """The activations as bfloat16; ValueError if one that is not masked is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = np.ascontiguousarray(block.acts[:, first:]).astype(ml_dtypes.bfloat16)
        bad = ((rounded.view(np.uint16) & 0x7FFF) >= 0x7F80).any(axis=2) & (codes[:, first:] == 0)
        if bad.any():
            context, position = np.argwhere(bad)[0]
            where = f"row {ids[context] - self._bounds[part]}"
            if self.length > 1:
                where = where.replace("row", "context") + f", position {first + position}"
            raise ValueError(
                f"{self._parts[part].path}: {int(bad.sum())} activations hold NaN or infinity (or "
                f"overflow bfloat16), the first at {where}; mask them or make them again"
            )
        return rounded
