"""Operations of the activation store under way, and what their failures are called."""

import errno
import re
from typing import Any

from saejax.data.records import CorruptStoreError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Pending:
    """A TensorStore operation under way; its errors name the file, the shard and the chunk."""

    def __init__(self, future: Any, name: str) -> None:
        future.force()
        self._future = future
        self._name = name

    def result(self) -> Any:
        """Waits for the operation."""
        return wait(self._name, self._future)


def wait(name: str, future: Any) -> Any:
    """A future's result; its error is raised anew with the file's name and a type that fits.

    Raises:
      PermissionError, FileNotFoundError, OSError: no permission or read-only; missing; no space.
      CorruptStoreError: a checksum differs, or a file is too short.
      ValueError: anything else.
    """
    try:
        return future.result()
    except ValueError as error:
        reason = str(error).split(" [tensorstore_spec")[0]
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else 0
        if number in _DENIED:
            text = f"{name}: no permission, or read-only. {reason}"
            raise PermissionError(number, text) from error
        if number:
            hint = "no space left; free some and run again. " if number in _FULL else ""
            raise OSError(number, f"{name}: {hint}{reason}") from error
        if reason.startswith("NOT_FOUND"):
            raise FileNotFoundError(f"{name} is missing. {reason}") from error
        if reason.startswith(("DATA_LOSS", "FAILED_PRECONDITION", "OUT_OF_RANGE")):
            shard = re.search(r"\(shard (\d+)", name)
            hint = (
                f"Delete commits/{int(shard[1]):06d}.json, and the harvest makes the shard again. "
                if shard
                else ""
            )
            text = f"{name}: damaged or not as declared. {hint}{reason}"
            raise CorruptStoreError(text) from error
        raise ValueError(f"{name}: {reason}") from error
