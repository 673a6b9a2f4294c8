"""The activation store: zarr3 shards through TensorStore, each published by a commit record.

A store holds the activations of one site of one subject model on one split of one text::

    spec.json              what the store is, with the digests of the array headers below
    acts/                  zarr3 [n_shards * R * C, d_model] bfloat16, one file a shard
    contexts/              zarr3 [n_shards * C, 3 + T] uint32: context id, document, offset, tokens
    documents.json         names of the documents
    commits/000123.json    row count, digest and sums of shard 123; written last, only if absent
    manifest.json          counts, mean, norms, variance; written when every shard is committed

C contexts of T tokens make a shard; the first `first_position` positions of each are left out, so
R = T - first_position rows of every context stay. Chunk j of a shard holds exactly one row of each
of the C contexts, at a position drawn for (seed, shard, context): a batch of whole chunks is as
good as an exact shuffle, with sequential reads and no buffer. A shard is a pure function of
(spec, index), so any number of writers may produce any shards at once and be killed at any moment;
readers trust commit records and nothing else. All files carry checksums.
"""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from saejax.data import records
from saejax.data.layout import (
    CONTEXT_COLUMNS,
    FORMAT,
    ShardRows,
    StoreSpec,
    check_same,
    position_order,
    stored_spec,
    zarr_spec,
)
from saejax.data.pending import Pending, wait
from saejax.data.records import CorruptStoreError

__all__ = ["CorruptStoreError", "ShardRows", "Store", "StoreSpec", "open_store"]
_HEADERS = ("acts/zarr.json", "contexts/zarr.json")
_BORROWED = {"can_reference_source_data_indefinitely": True}  # the writer waits, so no copy
_READ_AHEAD = 3  # more only costs memory


def open_store(
    path: str | os.PathLike[str], spec: StoreSpec | None = None, mode: str = "r"
) -> "Store":
    """Opens a store for reading ('r'), or creates or continues one for writing ('w').

    `path` is a local folder or any TensorStore key-value URL that ends in a folder (gs://, s3://).

    Raises:
      FileNotFoundError: mode 'r' and there is no store at `path`.
      ValueError: the store at `path` is of another spec; every differing field is named.
      CorruptStoreError: spec.json or an array's header is damaged.
      OSError: the place cannot be written (PermissionError), or is full.
    """
    if mode not in ("r", "w"):
        raise ValueError(f"open_store mode = {mode!r}: must be 'r' or 'w'.")
    if mode == "w" and spec is None:
        raise ValueError("open_store mode = 'w' needs a spec.")
    files = _Files(path)
    found = files.read_json("spec.json")
    if found is None:
        if mode == "r":
            raise FileNotFoundError(f"{files.name('spec.json')} is missing: no store there.")
        _open_arrays(files, spec, create=True)
        digests = {name: records.sha256(files.read(name) or b"") for name in _HEADERS}
        content = {"format": FORMAT, "spec": dataclasses.asdict(spec), "sha256": digests}
        files.write_once("spec.json", content)
        found = files.read_json("spec.json")
    stored = stored_spec(files.name("spec.json"), found)
    if spec is not None:
        check_same(files.root, stored, spec)
    for name in _HEADERS:
        header = files.read(name)
        if header is None:
            raise FileNotFoundError(f"{files.name(name)} is missing.")
        if records.sha256(header) != found["sha256"][name]:
            raise CorruptStoreError(f"{files.name(name)}: damaged (checksum mismatch).")
    return Store(files, stored, *_open_arrays(files, stored, create=False))


class Store:
    """An open activation store; made by `open_store`.

    Attributes:
      path: where it is.
      spec: what it is.
    """

    def __init__(self, files: "_Files", spec: StoreSpec, acts: Any, contexts: Any) -> None:
        self.path = files.root
        self.spec = spec
        self._files = files
        self._acts = acts
        self._contexts = contexts
        self._records: dict[int, dict[str, Any]] = {}

    @property
    def n_rows(self) -> int:
        """Rows of the complete store."""
        return self.spec.n_shards * self.spec.rows_per_shard

    def committed(self) -> list[int]:
        """Sorted indices of the shards that have a commit record; one listing, no reads."""
        return self._files.commits()

    def record(self, shard: int) -> dict[str, Any]:
        """The commit record of one shard, verified."""
        if shard not in self._records:
            name = _commit_name(shard)
            found = self._files.read_json(name)
            if found is None:
                raise FileNotFoundError(f"{self._files.name(name)} is missing: not committed.")
            expected = {"spec": self.spec.fingerprint(), "shard": shard}
            if {key: found.get(key) for key in expected} != expected:
                raise CorruptStoreError(f"{self._files.name(name)}: belongs to another store.")
            self._records[shard] = found
        return self._records[shard]

    @property
    def records(self) -> dict[int, dict[str, Any]]:
        """The commit records of all committed shards."""
        return {shard: self.record(shard) for shard in self.committed()}

    def require_complete(self) -> None:
        """ValueError unless every shard is committed."""
        missing = sorted(set(range(self.spec.n_shards)) - set(self.committed()))
        if missing:
            raise ValueError(
                f"{self.path}: unfinished, {len(missing)} of {self.spec.n_shards} shards have no "
                f"commit record (first: {missing[0]}). Run the harvest again to complete it."
            )

    @property
    def manifest(self) -> dict[str, Any]:
        """Counts and statistics of the finished store; see `finish`."""
        found = self._files.read_json("manifest.json")
        if found is None:
            raise FileNotFoundError(f"{self._files.name('manifest.json')} is missing: unfinished.")
        return found

    @property
    def documents(self) -> tuple[str, ...]:
        """Names that `ShardRows.document` points to; empty when none were written."""
        found = self._files.read_json("documents.json")
        return tuple(found["names"]) if found else ()

    def read_chunk(self, shard: int, chunk: int) -> "Pending":
        """Starts reading one chunk; `.result()` is bfloat16 [C, D], slot c a row of context c."""
        n_rows, n_contexts = self.spec.rows_per_context, self.spec.contexts_per_shard
        if not (0 <= shard < self.spec.n_shards and 0 <= chunk < n_rows):
            raise IndexError(
                f"{self.path}: no chunk {chunk} of shard {shard}; the store has "
                f"{self.spec.n_shards} shards of {n_rows} chunks."
            )
        start = (shard * n_rows + chunk) * n_contexts
        name = f"{self._files.name(f'acts/c/{shard}/0')} (shard {shard}, chunk {chunk})"
        return Pending(self._acts[start : start + n_contexts].read(), name)

    def positions(self, shard: int, chunk: int) -> np.ndarray:
        """int32 [C]: the token position, in its context, of each slot of a chunk."""
        return self._order(shard)[:, chunk] + self.spec.first_position

    def position(self, shard: int, chunk: int, slot: int) -> int:
        """The token position, in its context, of one row."""
        return int(self.positions(shard, chunk)[slot])

    def read_contexts(self, shard: int) -> np.ndarray:
        """uint32 [C, 3 + T]: context id, document, token offset, tokens of each slot's context."""
        n = self.spec.contexts_per_shard
        name = f"{self._files.name(f'contexts/c/{shard}/0')} (shard {shard}, chunk 0)"
        return Pending(self._contexts[shard * n : (shard + 1) * n].read(), name).result()

    def read_shard_rows(self, shard: int) -> ShardRows:
        """One shard in context order, checked against its commit record's digest."""
        spec, record, order_CR = self.spec, self.record(shard), self._order(shard)
        n = spec.contexts_per_shard
        rows_CRD = np.empty((n, spec.rows_per_context, spec.d_model), np.uint16)
        table = self.read_contexts(shard)

        def placed() -> Iterator[np.ndarray]:
            for j, chunk in enumerate(self._read_ahead(shard)):
                bits_CD = chunk.view(np.uint16)
                rows_CRD[np.arange(n), order_CR[:, j]] = bits_CD
                yield bits_CD

        if records.content_digest(placed(), table) != record["sha256"]:
            raise CorruptStoreError(
                f"{self._files.name(f'acts/c/{shard}/0')} (shard {shard}): its content is not what "
                f"{_commit_name(shard)} records. Delete that record and harvest again."
            )
        columns = table[:, 0], table[:, 1], table[:, 2]
        return ShardRows(rows_CRD.view(ml_dtypes.bfloat16), table[:, CONTEXT_COLUMNS:], *columns)

    def rows(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """All chunks in file order: (bfloat16 [C, D], shard, chunk)."""
        for shard in self.committed():
            for j, chunk in enumerate(self._read_ahead(shard)):
                yield chunk, shard, j

    def verify(self) -> None:
        """Reads every file of a finished store; raises at the first that is damaged or missing."""
        self.require_complete()
        found = [self.record(shard) for shard in self.committed()]
        if self.manifest["sha256"] != records.records_digest(found):
            raise CorruptStoreError(f"{self._files.name('manifest.json')}: not of these records.")
        for shard in self.committed():
            self.read_shard_rows(shard)
        if len(self.documents) != self.manifest["documents"]:
            raise CorruptStoreError(f"{self._files.name('documents.json')}: not of this manifest.")

    def write_shard(
        self,
        shard: int,
        acts: np.ndarray,
        *,
        tokens: np.ndarray,
        context: np.ndarray,
        document: np.ndarray,
        offset: np.ndarray,
    ) -> bool:
        """Writes one shard and then its commit record; False when it was committed already.

        Args:
          shard: index in [0, n_shards).
          acts: [C, R, D] bfloat16 or a float type, in context order, kept positions only.
          tokens, context, document, offset: [C, T], [C], [C], [C] integers.

        Raises:
          ValueError: wrong shape; NaN or infinity (counted, with the first document); or another
            writer committed other values for this shard.
          OSError: no permission or no space.
        """
        record_name = _commit_name(shard)
        absent = self._files.absent(record_name)
        if absent is None:
            return False
        rows_CRD = records.rounded_bits(self.path, self.spec, shard, acts)
        records.refuse_non_finite(self.spec, shard, rows_CRD, document, lambda: self.documents)
        columns = np.stack([context, document, offset], axis=1)
        table = np.concatenate([columns, tokens], axis=1, dtype=np.uint32, casting="unsafe")
        slots = np.arange(self.spec.contexts_per_shard)[None, :]
        rows_RCD = rows_CRD[slots, self._order(shard).T]
        flat = rows_RCD.reshape(-1, self.spec.d_model)
        n, size = self.spec.contexts_per_shard, len(flat)
        acts_view = self._acts[shard * size : (shard + 1) * size]
        writes = {  # in flight while the digest and the sums are taken
            "acts": acts_view.write(flat.view(ml_dtypes.bfloat16), **_BORROWED).commit,
            "contexts": self._contexts[shard * n : (shard + 1) * n]
            .write(table, **_BORROWED)
            .commit,
        }
        pending = [Pending(w, self._files.name(f"{k}/c/{shard}/0")) for k, w in writes.items()]
        digest = records.content_digest(rows_RCD, table)
        record = records.shard_record(self.spec, shard, rows_CRD, digest)
        for write in pending:
            write.result()
        won = self._files.write_if(record_name, record, absent)
        if not won and self.record(shard)["sha256"] != record["sha256"]:
            raise ValueError(
                f"{self._files.name(record_name)}: another writer committed other values for shard "
                f"{shard}; one spec must give one result, so both writers need the same software, "
                "precision and batch. Delete that record and harvest again with one of them."
            )
        return won

    def write_documents(self, names: Sequence[str]) -> None:
        """Writes the documents' names, once; the spec's text fingerprint fixes them."""
        self._files.write_once("documents.json", {"names": list(names)})

    def finish(self, provenance: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Merges all commit records into manifest.json; returns it (keys: `records.merge`)."""
        self.require_complete()
        found = [self.record(shard) for shard in range(self.spec.n_shards)]
        manifest = records.merge(self.spec, found, len(self.documents), provenance or {})
        if self._files.read("manifest.json") != records.seal(manifest):
            self._files.write("manifest.json", manifest)
        return self.manifest

    def _read_ahead(self, shard: int) -> Iterator[np.ndarray]:
        pending: collections.deque[Pending] = collections.deque()
        for j in range(self.spec.rows_per_context):
            pending.append(self.read_chunk(shard, j))
            if len(pending) > _READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _order(self, shard: int) -> np.ndarray:
        spec = self.spec
        return position_order(spec.seed, shard, spec.contexts_per_shard, spec.rows_per_context)


class _Files:
    """The small files of a store, over any key-value store; JSON carries its own digest."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if "://" in text:
            self.root = text.rstrip("/")
            spec: Any = self.root + "/"
        else:
            self.root = os.path.abspath(os.path.expanduser(text))
            spec = {"driver": "file", "path": self.root.rstrip("/") + "/"}
        self._kvstore = wait(self.root, ts.KvStore.open(spec, context=_context()))

    def name(self, key: str) -> str:
        return f"{self.root}/{key}"

    def array(self, key: str) -> Any:
        return (self._kvstore / f"{key}/").spec().to_json()

    def read(self, key: str) -> bytes | None:
        found = wait(self.name(key), self._kvstore.read(key))
        return bytes(found.value) if found.state == "value" else None

    def read_json(self, key: str) -> dict[str, Any] | None:
        data = self.read(key)
        return None if data is None else records.unseal(data, self.name(key))

    def write(self, key: str, content: Mapping[str, Any]) -> None:
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
        absent = self.absent(key)
        if absent is not None:
            self.write_if(key, content, absent)

    def commits(self) -> list[int]:
        keys = wait(self.name("commits"), (self._kvstore / "commits/").list())
        found = (re.fullmatch(r"(\d{6})\.json", key.decode()) for key in keys)
        return sorted(int(match[1]) for match in found if match)


@functools.cache
def _context() -> Any:
    # No cache: a loader reads each chunk once an epoch, and a stale chunk would hide damage.
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


def _open_arrays(files: _Files, spec: StoreSpec, *, create: bool) -> tuple[Any, Any]:
    n, rows = spec.contexts_per_shard, spec.rows_per_shard
    columns = CONTEXT_COLUMNS + spec.context_length
    acts = zarr_spec(files.array("acts"), "bfloat16", spec.n_shards, (rows, n), spec.d_model)
    contexts = zarr_spec(files.array("contexts"), "uint32", spec.n_shards, (n, n), columns)
    return tuple(
        wait(
            f"{files.root}: array {name!r}",
            ts.open(array, open=True, create=create, context=_context()),
        )
        for name, array in (("acts", acts), ("contexts", contexts))
    )


def _commit_name(shard: int) -> str:
    return f"commits/{shard:06d}.json"
