"""The small files of an activation store, over any key-value store; JSON carries its own digest."""

import collections
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from saejax.data import records
from saejax.data.pending import wait

_READS_AT_ONCE = 64  # of small files, where a remote read takes as long as any


class Files:
    """Files of one store by their name in it.

    Attributes:
      root: where the store is, for messages.
    """

    def __init__(self, root: str, kvstore: Any) -> None:
        """Takes an open TensorStore key-value store that begins at `root`."""
        self.root = root
        self._kvstore = kvstore

    def name(self, key: str) -> str:
        """A file as messages call it."""
        return f"{self.root}/{key}"

    def array(self, key: str) -> Any:
        """The key-value store of an array, for its spec."""
        return (self._kvstore / f"{key}/").spec().to_json()

    def read(self, key: str) -> bytes | None:
        """A file's bytes, None when it is missing."""
        found = wait(self.name(key), self._kvstore.read(key))
        return bytes(found.value) if found.state == "value" else None

    def read_json(self, key: str) -> dict[str, Any] | None:
        """The content of a sealed file, verified; None when it is missing."""
        data = self.read(key)
        return None if data is None else records.unseal(data, self.name(key))

    def read_many(self, keys: Iterable[str]) -> Iterator[dict[str, Any] | None]:
        """`read_json` of each key in order, with many reads under way at once."""
        pending: collections.deque[tuple[str, Any]] = collections.deque()

        def first() -> dict[str, Any] | None:
            name, future = pending.popleft()
            found = wait(name, future)
            return records.unseal(bytes(found.value), name) if found.state == "value" else None

        for key in keys:
            pending.append((self.name(key), self._kvstore.read(key)))
            if len(pending) >= _READS_AT_ONCE:
                yield first()
        while pending:
            yield first()

    def write(self, key: str, content: Mapping[str, Any]) -> None:
        """Writes a sealed file, whole or not at all."""
        wait(self.name(key), self._kvstore.write(key, records.seal(content)))

    def absent(self, key: str) -> bytes | None:
        """The generation that stands for "missing", or None when the file is there."""
        found = wait(self.name(key), self._kvstore.read(key))
        return None if found.state == "value" else found.stamp.generation

    def write_if(self, key: str, content: Mapping[str, Any], absent: bytes) -> bool:
        """Writes a file that is still missing; False when another writer was first."""
        # `absent` comes from a read: if_equal=b"" would mean "always write".
        write = self._kvstore.write(key, records.seal(content), if_equal=absent)
        return wait(self.name(key), write).generation != b""

    def write_once(self, key: str, content: Mapping[str, Any]) -> None:
        """Writes a file unless it is there."""
        absent = self.absent(key)
        if absent is not None:
            self.write_if(key, content, absent)

    def commits(self) -> list[int]:
        """Sorted indices of the commit records that are there; one listing, no reads."""
        keys = wait(self.name("commits"), (self._kvstore / "commits/").list())
        found = (re.fullmatch(r"(\d{6})\.json", key.decode()) for key in keys)
        return sorted(int(match[1]) for match in found if match)
