"""The commit records of a store: which shards are there, and what each of them holds."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from saejax.data.files import Files
from saejax.data.layout import StoreSpec
from saejax.data.records import SUMS, CorruptStoreError


class Commits:
    """The records of one store, each verified when it is read."""

    def __init__(
        self, files: Files, spec: StoreSpec, computation: Mapping[str, Any] | None = None
    ) -> None:
        """Reads nothing yet; `computation` is said of every shard that is published."""
        self._files = files
        self._said = {"computation": dict(computation)} if computation else {}
        self._accepted = (spec.fingerprint(), spec.former_fingerprint())
        self._kept: dict[int, dict[str, Any]] = {}

    def all(self) -> list[int]:
        """Sorted indices of the shards that have a record; one listing, no reads."""
        return self._files.commits()

    def absent(self, shard: int) -> bytes | None:
        """See `Files.absent`."""
        return self._files.absent(name_of(shard))

    def has(self, shard: int) -> bool:
        """Whether one shard has a record."""
        return shard in self._kept or self.absent(shard) is None

    def publish(self, shard: int, record: dict[str, Any], absent: bytes) -> bool:
        """Writes a record that is still missing; False when another writer was first."""
        return self._files.write_if(name_of(shard), record | self._said, absent)

    def record(self, shard: int) -> dict[str, Any]:
        """The record of one shard without its sums, which are as wide as a row."""
        if shard not in self._kept:
            found = self._sound(shard, self._files.read_json(name_of(shard)))
            self._kept[shard] = {key: found[key] for key in found if key not in SUMS}
        return self._kept[shard]

    def whole(self, shards: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Whole records in the order asked for, many reads under way at once and none kept."""
        numbers = list(shards)
        found = self._files.read_many(name_of(shard) for shard in numbers)
        for shard, content in zip(numbers, found, strict=True):
            yield self._sound(shard, content)

    def check_equal(self, shard: int, ours: Mapping[str, Any], state: str) -> None:
        """ValueError unless the record that is there is of the same content as ours."""
        if self.record(shard)["sha256"] != ours["sha256"]:
            raise ValueError(
                f"{self._files.name(name_of(shard))}: another writer committed other values for "
                f"shard {shard}, which {state}; one spec must give one result, so both writers "
                "need the same software, precision and batch. Delete that record and run again "
                "with one of them, and the shard is produced again."
            )

    def _sound(self, shard: int, found: dict[str, Any] | None) -> dict[str, Any]:
        name = self._files.name(name_of(shard))
        if found is None:
            raise FileNotFoundError(f"{name} is missing: not committed.")
        if found.get("shard") != shard or found.get("spec") not in self._accepted:
            raise CorruptStoreError(f"{name}: belongs to another store.")
        return found


def name_of(shard: int) -> str:
    """Name of a shard's record in the store."""
    return f"commits/{shard:06d}.json"
