"""The activation store: zarr3 shards through TensorStore, each published by a commit record.

A store holds the activations of one site of one subject model on one split of one text::

    spec.json              what the store is, with the digests of the array headers below
    acts/                  zarr3 [n_shards * R * C, d_model] bfloat16, one file a shard
    contexts/              zarr3 [n_shards * C, 3 + T + ceil(R / 32)] uint32: context id, document,
                           offset, tokens, one bit for each row that is not masked
    documents.json         names of the documents
    commits/000123.json    chunks, rows, digest and sums of shard 123, and what computed it;
                           written last, only if absent
    manifest.json          counts, mean, norms, variance; written when every shard is committed

C contexts of T tokens make a shard; the first `first_position` positions of each are left out, so
R = T - first_position rows of every context may stay. Chunk j of a shard holds one row of each of
the C contexts, in an order of positions drawn for (seed, shard, context): a batch of whole chunks
is as good as an exact shuffle, with sequential reads and no buffer. Masked rows (BOS, special
tokens, padding, outlying norms) are not stored; see `layout.chunk_places` for who then stands in.
A shard is a pure function of (spec, index), so any number of writers may produce any shards at
once and be killed at any moment; readers trust commit records and nothing else. All files carry
checksums.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from saejax.data import layout, records
from saejax.data.commits import Commits, name_of
from saejax.data.content import Content
from saejax.data.files import Files
from saejax.data.layout import CONTEXT_COLUMNS, FORMAT, ShardRows, StoreSpec
from saejax.data.pending import Pending, wait
from saejax.data.recent import Recent
from saejax.data.records import CorruptStoreError

__all__ = ["CorruptStoreError", "NoStoreError", "ShardRows", "Store", "StoreSpec", "open_store"]
_HEADERS = ("acts/zarr.json", "contexts/zarr.json")
_BORROWED = {"can_reference_source_data_indefinitely": True}  # the writer waits, so no copy
_READ_AHEAD = 3  # more only costs memory
_PLACES_KEPT = 64


class NoStoreError(FileNotFoundError):
    """There is no store at a place: not so much as a spec.json."""


def open_store(
    path: str | os.PathLike[str],
    spec: StoreSpec | None = None,
    mode: str = "r",
    computation: Mapping[str, Any] | None = None,
) -> "Store":
    """Opens a store for reading ('r'), or creates or continues one for writing ('w').

    Args:
      path: a local folder or any TensorStore key-value URL that ends in a folder (gs://, s3://).
      spec: must be that of the store there; needed to create one.
      mode: 'r' or 'w'.
      computation: how this writer computes rows (hardware, versions, size of a pass, which may
        change the last bits of a row), as its commit records will say; None says nothing.

    Raises:
      NoStoreError: mode 'r' and there is no store at `path`.
      FileNotFoundError: a file of the store is missing.
      ValueError: the store at `path` is of another spec; every differing field is named.
      CorruptStoreError: spec.json or an array's header is damaged.
      OSError: the place cannot be written (PermissionError), or is full.
    """
    if mode not in ("r", "w"):
        raise ValueError(f"open_store mode = {mode!r}: must be 'r' or 'w'.")
    if mode == "w" and spec is None:
        raise ValueError("open_store mode = 'w' needs a spec.")
    files = _open_files(path)
    found = files.read_json("spec.json")
    if found is None:
        if mode == "r":
            raise NoStoreError(f"{files.name('spec.json')} is missing: no store there.")
        _create_arrays(files, spec)
        digests = {name: records.sha256(files.read(name) or b"") for name in _HEADERS}
        content = {"format": FORMAT, "spec": dataclasses.asdict(spec), "sha256": digests}
        files.write_once("spec.json", content)
        found = files.read_json("spec.json")
    stored = layout.stored_spec(files.name("spec.json"), found)
    if spec is not None:
        layout.check_same(files.root, stored, spec)
    for name in _HEADERS:
        header = files.read(name)
        if header is None:
            raise FileNotFoundError(f"{files.name(name)} is missing; restore it, or store anew.")
        if records.sha256(header) != found["sha256"][name]:
            raise CorruptStoreError(f"{files.name(name)}: damaged (checksum mismatch).")
    return Store(files, stored, Commits(files, stored, computation))


class Store:
    """An open activation store; made by `open_store`.

    Attributes:
      path: where it is.
      spec: what it is.
    """

    def __init__(self, files: Files, spec: StoreSpec, commits: Commits) -> None:
        self.path = files.root
        self.spec = spec
        self._files = files
        self._acts, self._contexts = _open_arrays(files, spec, create=False)
        self._commits = commits
        self._lead: int | None = None
        self._chunks: np.ndarray | None = None
        self._places: Recent[int, np.ndarray] = Recent(_PLACES_KEPT)

    @property
    def n_rows(self) -> int:
        """Rows of the finished store."""
        return self.manifest["rows"]

    @property
    def chunks(self) -> np.ndarray:
        """int64 [n_shards]: chunks of every shard of the finished store."""
        if self._chunks is None:
            self._chunks = np.array(self.manifest["chunks"])
        return self._chunks

    def committed(self) -> list[int]:
        """Sorted indices of the shards that have a commit record; one listing, no reads."""
        return self._commits.all()

    def is_committed(self, shard: int) -> bool:
        """Whether one shard has a commit record."""
        return self._commits.has(shard)

    def record(self, shard: int) -> dict[str, Any]:
        """The commit record of one shard, verified, without its sums."""
        return self._commits.record(shard)

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
    def lead(self) -> int:
        """Tokens before the document's own in each context, 0 where the manifest says nothing."""
        if self._lead is None:
            found = self._files.read_json("manifest.json") or {"provenance": {}}
            self._lead = int(found["provenance"].get("lead", 0))
        return self._lead

    @property
    def documents(self) -> tuple[str, ...]:
        """Names that `ShardRows.document` points to; empty when none were written."""
        found = self._files.read_json("documents.json")
        return tuple(found["names"]) if found else ()

    def read_chunk(self, shard: int, chunk: int) -> "Pending":
        """Starts reading one chunk; `.result()` is bfloat16 [C, D]; see `where` for its rows."""
        if not 0 <= shard < self.spec.n_shards:
            raise IndexError(f"{self.path}: no shard {shard}; the store has {self.spec.n_shards}.")
        chunks = self._count(shard)
        if not 0 <= chunk < chunks:
            raise IndexError(f"{self.path}: no chunk {chunk} of shard {shard}; it has {chunks}.")
        n_contexts = self.spec.contexts_per_shard
        start = (shard * self.spec.rows_per_context + chunk) * n_contexts
        name = f"{self._files.name(f'acts/c/{shard}/0')} (shard {shard}, chunk {chunk})"
        return Pending(self._acts[start : start + n_contexts].read(), name)

    def where(self, shard: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """Provenance of a chunk's rows: int64 [C] each, context and token position.

        The context is a row of `read_contexts(shard)`, the position one of its tokens.
        """
        context, row = np.divmod(self._places_of(shard)[chunk], self.spec.rows_per_context)
        return context, row + self.spec.first_position

    def read_contexts(self, shard: int) -> np.ndarray:
        """uint32 [C, 3 + T]: context id, document, token offset and tokens of each context."""
        return self._read_table(shard)[:, : CONTEXT_COLUMNS + self.spec.context_length]

    def read_mask(self, shard: int) -> np.ndarray:
        """bool [C, T]: positions that are neither masked nor before `first_position`.

        They are the rows of the shard, but for those that filled no chunk.
        """
        mask_CT = np.zeros((self.spec.contexts_per_shard, self.spec.context_length), bool)
        mask_CT[:, self.spec.first_position :] = self._kept(self._read_table(shard))
        return mask_CT

    def read_shard_rows(self, shard: int) -> ShardRows:
        """One shard in context order, checked against its commit record's digest."""
        spec, record = self.spec, self.record(shard)
        n = spec.contexts_per_shard * spec.rows_per_context
        table = self._read_table(shard)
        places_JC = self._places_of(shard, table)
        whole = record["rows"] == n
        rows_ND = (np.empty if whole else np.zeros)((n, spec.d_model), np.uint16)
        stored_N = np.zeros(n, bool)
        stored_N[places_JC] = True

        def placed() -> Iterator[np.ndarray]:
            for j, chunk in enumerate(self._read_ahead(shard)):
                bits_CD = chunk.view(np.uint16)
                rows_ND[places_JC[j]] = bits_CD
                yield bits_CD

        if records.content_digest(placed(), table) != record["sha256"]:
            raise CorruptStoreError(
                f"{self._files.name(f'acts/c/{shard}/0')} (shard {shard}): its content is not what "
                f"{name_of(shard)} records. Delete both and harvest again."
            )
        return ShardRows.of(spec, table, rows_ND, stored_N, self.lead)

    def rows(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """All chunks in file order: (bfloat16 [C, D], shard, chunk)."""
        for shard in self.committed():
            for j, chunk in enumerate(self._read_ahead(shard)):
                yield chunk, shard, j

    def verify(self) -> None:
        """Reads every file of a finished store; raises at the first that is damaged or missing."""
        self.require_complete()
        found = [(r["sha256"], r["chunks"]) for r in self._commits.whole(range(self.spec.n_shards))]
        digests, chunks = zip(*found, strict=True)
        said = self.manifest
        if (said["sha256"], said["chunks"]) != (records.records_digest(digests), list(chunks)):
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
        masked: np.ndarray | None = None,
    ) -> bool:
        """Writes one shard and then its commit record; False when it was committed already.

        Args:
          shard: index in [0, n_shards).
          acts: [C, R, D] bfloat16 or a float type, in context order.
          tokens, context, document, offset: [C, T], [C], [C], [C] integers.
          masked: [C, T] codes of `layout.MASKED`, 0 for a position that may be stored; None for no
            mask. Rows with outlying norms are found here, see `StoreSpec.max_norm_ratio`.

        Raises:
          ValueError: wrong shape; NaN or infinity (counted, with the first document); or another
            writer committed other values for this shard meanwhile.
          OSError: no permission or no space.
        """
        if self._commits.absent(shard) is None:
            return False
        content = Content.of(
            self.spec,
            shard,
            acts,
            tokens=tokens,
            provenance=np.stack([context, document, offset], axis=1),
            masked=masked,
            name_of=lambda i: self.documents[i] if i < len(self.documents) else f"document {i}",
        )
        # Looked for again at the last moment: what is committed is never written over knowingly.
        absent = self._commits.absent(shard)
        if absent is None:
            self._commits.check_equal(shard, content.record(self.spec, shard), "is whole")
            return False
        pending = self._start_writes(shard, content.bits_JCD, content.table)
        record = content.record(self.spec, shard)  # while the writes are in flight
        for write in pending:
            write.result()
        won = self._commits.publish(shard, record, absent)
        if not won:
            self._commits.check_equal(shard, record, "may hold bytes of both, and is in doubt")
        return won

    def write_documents(self, names: Sequence[str]) -> None:
        """Writes the documents' names, once; the spec's text fingerprint fixes them."""
        self._files.write_once("documents.json", {"names": list(names)})

    def finish(self, provenance: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Merges all commit records into manifest.json; returns it (keys: `records.merge`)."""
        self.require_complete()
        self._lead = None
        found = self._commits.whole(range(self.spec.n_shards))
        manifest = records.merge(self.spec, found, len(self.documents), provenance or {})
        if self._files.read("manifest.json") != records.seal(manifest):
            self._files.write("manifest.json", manifest)
        return self.manifest

    def _start_writes(self, shard: int, bits_JCD: np.ndarray, table: np.ndarray) -> list[Pending]:
        n, size = self.spec.contexts_per_shard, self.spec.rows_per_shard
        rows_ND = bits_JCD.reshape(-1, self.spec.d_model).view(ml_dtypes.bfloat16)
        acts = self._acts[shard * size : shard * size + len(rows_ND)]
        writes = {"contexts": self._contexts[shard * n : (shard + 1) * n].write(table, **_BORROWED)}
        if len(rows_ND):
            writes["acts"] = acts.write(rows_ND, **_BORROWED)
        return [
            Pending(write.commit, self._files.name(f"{key}/c/{shard}/0"))
            for key, write in writes.items()
        ]

    def _count(self, shard: int) -> int:
        return int(self.record(shard)["chunks"] if self._chunks is None else self._chunks[shard])

    def _read_table(self, shard: int) -> np.ndarray:
        n = self.spec.contexts_per_shard
        name = f"{self._files.name(f'contexts/c/{shard}/0')} (shard {shard}, chunk 0)"
        return Pending(self._contexts[shard * n : (shard + 1) * n].read(), name).result()

    def _kept(self, table: np.ndarray) -> np.ndarray:
        words_CW = table[:, CONTEXT_COLUMNS + self.spec.context_length :]
        return layout.unpack_mask(words_CW, self.spec.rows_per_context)

    def _places_of(self, shard: int, table: np.ndarray | None = None) -> np.ndarray:
        def drawn() -> np.ndarray:
            kept_CR = self._kept(self._read_table(shard) if table is None else table)
            order_CR = layout.position_order(self.spec.seed, shard, *kept_CR.shape)
            return layout.chunk_places(order_CR, kept_CR)

        return self._places.get(shard, drawn)

    def _read_ahead(self, shard: int) -> Iterator[np.ndarray]:
        pending: collections.deque[Pending] = collections.deque()
        for j in range(self._count(shard)):
            pending.append(self.read_chunk(shard, j))
            if len(pending) > _READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _open_files(path: str | os.PathLike[str]) -> Files:
    text = os.fspath(path)
    if "://" in text:
        root = text.rstrip("/")
        spec: Any = root + "/"
    else:
        root = os.path.abspath(os.path.expanduser(text))
        spec = {"driver": "file", "path": root.rstrip("/") + "/"}
    return Files(root, wait(root, ts.KvStore.open(spec, context=_context())))


@functools.cache
def _context() -> Any:
    # No cache: a loader reads each chunk once an epoch, and a stale chunk would hide damage.
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


def _open_arrays(files: Files, spec: StoreSpec, *, create: bool) -> tuple[Any, Any]:
    count, n, rows = spec.n_shards, spec.contexts_per_shard, spec.rows_per_shard
    acts = layout.zarr_spec(files.array("acts"), "bfloat16", count, (rows, n), spec.d_model)
    contexts = layout.zarr_spec(files.array("contexts"), "uint32", count, (n, n), spec.columns)
    return tuple(
        wait(
            f"{files.root}: array {name!r}",
            ts.open(array, open=True, create=create, context=_context()),
        )
        for name, array in (("acts", acts), ("contexts", contexts))
    )


def _create_arrays(files: Files, spec: StoreSpec) -> None:
    try:
        _open_arrays(files, spec, create=True)
    except CorruptStoreError as error:
        raise ValueError(
            f"{files.root} holds the beginning of a store of another spec, without a spec.json "
            f"({error}). Choose another path, or delete that store."
        ) from error
