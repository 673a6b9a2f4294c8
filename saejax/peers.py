"""What several processes find out separately and must decide as one, with the arrays they hold."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from saejax import digests
from saejax.digests import DamageError

_TEXT = 400
_SECONDS = 3600  # of reading what was written; who waits for the save is watched


class Peers:
    """The processes that work on one checkpoint: all of the run, or this one alone."""

    def __init__(self, *, alone: bool = False):
        """`alone`: this process counts itself as the only one."""
        self.index = 0 if alone else jax.process_index()
        self.count = 1 if alone else jax.process_count()

    @property
    def first(self) -> bool:
        """Whether this is the process that changes folders."""
        return self.index == 0

    def share(self, names: list[str]) -> list[str]:
        """The part of a list that is this process's work; both must be the same in all."""
        return names[self.index :: self.count]

    def gather(self, text: str | None) -> list[str | None]:
        """What each process says, cut to 400 bytes, in all of them; all must call it."""
        if self.count == 1:
            return [text]
        data = np.zeros(_TEXT + 4, np.uint8)
        if text is not None:
            code = text.encode()[:_TEXT]
            data[: len(code)] = np.frombuffer(code, np.uint8)
            data[-1] = 1
        rows = np.asarray(multihost_utils.process_allgather(data)).astype(np.uint8)
        said = [row[:_TEXT].tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
        return [text if row[-1] else None for text, row in zip(said, rows)]

    def from_first(self, text: str | None) -> str | None:
        """What process 0 says; all must call it."""
        return self.gather(text)[0]

    def together(self, action: Callable[[], Any]) -> Any:
        """The result of `action` here; what any process finds damaged is damaged for all.

        Raises:
          DamageError: in every process.
        """
        result = fault = None
        try:
            result = action()
        except DamageError as error:
            fault = error
        for said in self.gather(None if fault is None else str(fault)):
            if said is not None:
                raise fault or DamageError(said)
        return result

    def file_sums(self, folder: pathlib.Path, exchange: pathlib.Path) -> dict[str, list]:
        """`digests.file_sums` of all files in a folder, each process reading its share.

        Safe in a thread of its own: they meet in the file system, not on the devices. All files
        must be there already, for every process.

        Args:
          folder: the files.
          exchange: a folder for what they tell each other; it is gone afterwards.

        Returns:
          All sums in process 0, and this process's share in the others.

        Raises:
          TimeoutError: a process did not do its part.
          OSError: they see different files.
        """
        names = digests.list_files(folder)
        sums = digests.file_sums(folder, self.share(names))
        if self.count == 1:
            return sums
        exchange.mkdir(exist_ok=True)
        if not self.first:
            partial = exchange / f"{self.index}.partial"
            digests.write_sealed(partial, sums)
            partial.rename(partial.with_suffix(".json"))
            return sums
        for other in range(1, self.count):
            path, deadline = exchange / f"{other}.json", time.monotonic() + _SECONDS
            while not path.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"process {other} was not done within {_SECONDS} s")
                time.sleep(0.02)
            sums |= digests.read_sealed(path)
            path.unlink()
        exchange.rmdir()
        if set(sums) != set(names):
            raise OSError(f"not all processes see the same files in {folder}")
        return sums
