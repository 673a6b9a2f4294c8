"""A store written out as safetensors files, for programs that know nothing of stores.

    index.json                              what it is: subject, site, mean, norms, files
    documents.json                          names of the documents
    activations-00001-of-00004.safetensors  activations [n, D] bfloat16; of each row tokens (its
                                            token id), context, document, offset (of its token in
                                            the document) and position (in the context)
    contexts-00001-of-00001.safetensors     context, document, offset, rows (how many are stored)
                                            and tokens [m, T] of every context

In text order the rows stand by context id and position; in stored order as the store gives them,
which is a good shuffle. The store is read once, and rows are put where they belong in files that
are mapped into memory. A file gets its name when it is whole, and index.json comes last.
"""

import collections
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from saejax.data.foreign.exported import DOCUMENTS, FORMAT, INDEX
from saejax.data.layout import CONTEXT_COLUMNS
from saejax.data.shards import Store

Order = Literal["text", "stored"]
Columns = Mapping[str, tuple[str, tuple[int, ...]]]
_TYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}
_ABOUT = ("rows", "contexts", "mean", "mean_norm", "mean_sq_norm", "total_variance", "left_out")
_BY_POSITION = ("count_by_position", "norm_by_position", "rms_norm_by_position")
_LARGEST = 2**31 - 1
_READ_AHEAD = 3
_LOG_SECONDS = 5.0


def export(
    store: Store,
    folder: str | os.PathLike[str],
    *,
    order: Order = "text",
    max_bytes: int = 2**30,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Writes a finished store out.

    Args:
      store: the store.
      folder: a local folder, new or empty, or with what an export that was killed left there.
      order: 'text' or 'stored'.
      max_bytes: a file's size at most, but for its header; a single row may exceed it.
      log: takes a line of progress.

    Returns:
      What index.json holds.

    Raises:
      ValueError: the store is unfinished; a folder with something else in it; a bad argument.
      OSError: no permission or no space.
    """
    if order not in ("text", "stored") or max_bytes < 1:
        raise ValueError(
            f"export order = {order!r}, max_bytes = {max_bytes}: allowed are 'text' and 'stored', "
            "and 1 or more"
        )
    store.require_complete()
    manifest, spec = store.manifest, store.spec
    path = _prepared(folder)
    metadata = {
        "format": FORMAT,
        "order": order,
        "subject": spec.subject,
        "site": spec.site,
        "split": spec.split,
        "mean_norm": repr(manifest["mean_norm"]),
    }
    columns, count = _rows(spec.d_model), manifest["rows"]
    rows = _Sheets(path, "activations", columns, count, max_bytes, metadata)
    columns, count = _contexts(spec.context_length), manifest["contexts"]
    contexts = _Sheets(path, "contexts", columns, count, max_bytes, metadata)
    places = _Places(store) if order == "text" else None
    _fill(store, rows, contexts, places, log)
    index = {
        "format": FORMAT,
        "order": order,
        "spec": manifest["spec"],
        **{key: manifest[key] for key in (*_ABOUT, *_BY_POSITION)},
        "has_tokens": manifest["provenance"].get("tokens", True),
        "store_sha256": manifest["sha256"],
        "provenance": manifest["provenance"],
        "files": rows.finish(),
        "context_files": contexts.finish(),
    }
    _write_json(path / DOCUMENTS, {"names": list(store.documents)})
    _write_json(path / INDEX, index)
    return index


def _rows(width: int) -> Columns:
    return {
        "activations": ("BF16", (width,)),
        "context": ("I64", ()),
        "offset": ("I64", ()),
        "tokens": ("I32", ()),
        "document": ("I32", ()),
        "position": ("I32", ()),
    }


def _contexts(length: int) -> Columns:
    return {
        "context": ("I64", ()),
        "offset": ("I64", ()),
        "rows": ("I64", ()),
        "tokens": ("I32", (length,)),
        "document": ("I32", ()),
    }


class _Places:
    """Where each context stands in text order: contexts and rows before it."""

    def __init__(self, store: Store) -> None:
        size = store.spec.contexts_per_shard
        ids, counts = [], []
        for shard in store.committed():
            ids.append(store.read_contexts(shard)[:, 0])
            counts.append(_stored(store, shard).sum(axis=1))
        order = np.argsort(np.concatenate(ids), kind="stable")
        flat = np.concatenate(counts)[order]
        self._rank = np.empty(len(order), np.int64)
        self._rank[order] = np.arange(len(order))
        self._start = np.empty(len(order), np.int64)
        self._start[order] = np.cumsum(flat) - flat
        self._size = size

    def of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [C] each: rank of the shard's contexts, and the first row of each."""
        part = slice(shard * self._size, (shard + 1) * self._size)
        return self._rank[part], self._start[part]


def _stored(store: Store, shard: int) -> np.ndarray:
    """bool [C, T]: positions that the store holds."""
    spec = store.spec
    stored_CT = np.zeros((spec.contexts_per_shard, spec.context_length), bool)
    for chunk in range(int(store.chunks[shard])):
        stored_CT[store.where(shard, chunk)] = True
    return stored_CT


def _fill(
    store: Store,
    rows: "_Sheets",
    contexts: "_Sheets",
    places: _Places | None,
    log: Callable[[str], None],
) -> None:
    n, done, logged = store.spec.contexts_per_shard, 0, time.monotonic()
    lead = store.lead
    for shard in store.committed():
        table, stored_CT = store.read_contexts(shard), _stored(store, shard)
        order_CT = np.cumsum(stored_CT, axis=1) - 1
        rank_C, start_C = np.arange(shard * n, (shard + 1) * n), np.empty(0)
        if places is not None:
            rank_C, start_C = places.of(shard)
        contexts.put(
            rank_C,
            context=table[:, 0],
            document=_narrow(table[:, 1]),
            offset=table[:, 2],
            rows=stored_CT.sum(axis=1),
            tokens=_narrow(table[:, CONTEXT_COLUMNS:]),
        )
        for j, chunk_CD in enumerate(_chunks(store, shard)):
            context, position = store.where(shard, j)
            at = np.arange(done, done + n)
            if places is not None:
                at = start_C[context] + order_CT[context, position]
            done += n
            of_row = table[context]
            rows.put(
                at,
                activations=chunk_CD,
                context=of_row[:, 0],
                offset=of_row[:, 2].astype(np.int64) + position - lead,
                tokens=_narrow(of_row[np.arange(n), CONTEXT_COLUMNS + position]),
                document=_narrow(of_row[:, 1]),
                position=position,
            )
        if time.monotonic() - logged > _LOG_SECONDS:
            log(f"export {store.spec.split}: shard {shard + 1}/{store.spec.n_shards}")
            logged = time.monotonic()


def _chunks(store: Store, shard: int) -> Iterator[np.ndarray]:
    pending: collections.deque = collections.deque()
    for j in range(int(store.chunks[shard])):
        pending.append(store.read_chunk(shard, j))
        if len(pending) > _READ_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _narrow(ids: np.ndarray) -> np.ndarray:
    if ids.size and int(ids.max()) > _LARGEST:
        raise ValueError(f"id {ids.max()} does not fit the int32 that is exported")
    return ids


class _Sheets:
    """Columns of a known length, in files of bounded size, filled in any order."""

    def __init__(
        self,
        folder: pathlib.Path,
        name: str,
        columns: Columns,
        count: int,
        max_bytes: int,
        metadata: Mapping[str, str],
    ) -> None:
        sizes = [
            _TYPES[kind].itemsize * int(np.prod(tail, dtype=np.int64))
            for kind, tail in columns.values()
        ]
        self._step = max(1, max_bytes // sum(sizes))
        self._counts = [min(self._step, count - start) for start in range(0, count, self._step)]
        total = len(self._counts)
        self._paths = [
            folder / f"{name}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)
        ]
        self._columns, self._metadata = columns, metadata
        self._open = [self._create(i) for i in range(total)]

    def put(self, at: np.ndarray, **columns: np.ndarray) -> None:
        """Writes rows to the places `at`."""
        sheet, local = np.divmod(at, self._step)
        for i in np.unique(sheet):
            mine = sheet == i
            for name, values in columns.items():
                self._open[i][name][local[mine]] = values[mine]

    def finish(self) -> list[dict[str, Any]]:
        """Brings the files to the disk and gives them their names."""
        self._open.clear()
        for path in self._paths:
            with open(_partial(path), "rb+") as file:
                os.fsync(file.fileno())
            os.replace(_partial(path), path)
        return [
            {"name": path.name, "rows": count, "bytes": path.stat().st_size}
            for path, count in zip(self._paths, self._counts, strict=True)
        ]

    def _create(self, i: int) -> dict[str, np.ndarray]:
        count, path = self._counts[i], _partial(self._paths[i])
        header: dict[str, Any] = {"__metadata__": {**self._metadata, "rows": str(count)}}
        end, spans = 0, {}
        for name, (kind, tail) in self._columns.items():
            size = count * _TYPES[kind].itemsize * int(np.prod(tail, dtype=np.int64))
            header[name] = {
                "dtype": kind,
                "shape": [count, *tail],
                "data_offsets": [end, end + size],
            }
            spans[name] = (end, _TYPES[kind], (count, *tail))
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            size = 8 + len(text) + end
            file.truncate(size)
            # Taken from the disk now: a full one would kill a process that writes through a map.
            if hasattr(os, "posix_fallocate"):  # not on every system
                os.posix_fallocate(file.fileno(), 0, size)
        first = 8 + len(text)
        return {
            name: np.memmap(path, dtype, "r+", first + start, shape)
            for name, (start, dtype, shape) in spans.items()
        }


def _prepared(folder: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    ours = ("activations-*-of-*.safetensors*", "contexts-*-of-*.safetensors*", f"{DOCUMENTS}*")
    left = [file for pattern in ours for file in path.glob(pattern)]
    strange = sorted(set(path.iterdir()) - set(left))
    if strange:
        raise ValueError(f"{path} is not empty ({strange[0].name}); choose another folder")
    for file in left:  # of an export that was killed: there is no index
        file.unlink()
    return path


def _partial(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    with open(_partial(path), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(_partial(path), path)
