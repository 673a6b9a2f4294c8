"""From a configured source to contexts; kept on disk, so that a source is tokenised once."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np

from saejax.data import corpus, id_files
from saejax.data.corpus import Documents, TextConfig
from saejax.data.progress import Log, Progress
from saejax.data.readers import HUB, TEXT_SUFFIXES, open_npy
from saejax.data.splits import Split
from saejax.data.token_arrays import IdsOnly, TokenDocuments, TokensConfig
from saejax.data.tokens import (
    Contexts,
    NoRowError,
    Sink,
    Tokenizer,
    encode_documents,
    pack_tokens,
    resolve_bos,
)

_FORMAT = 2  # raise it when the same source gives other contexts than before
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_META = "contexts.json"
_NAMES = "names.json"


def load_contexts(
    cfg: TextConfig | TokensConfig,
    split: Split,
    tokenizer: Tokenizer,
    context_length: int,
    cache: str | os.PathLike[str] | None = None,
    *,
    keep_special: bool = False,
    log: Log | None = None,
) -> Contexts:
    """The contexts of one split of a source, from the cache if they are there.

    A cache entry is a folder of .npy files, which are memory-mapped, named by a digest of the
    source's state, the settings, the split, the tokenizer and the context length. Its contents are
    checked against the sha256 written with them. A source whose files changed (name, size or time
    of change in nanoseconds; text for 'python') has another digest, so that an old entry is never
    used; nobody deletes it. An entry is built in a hidden folder beside its place and renamed, so
    that a killed run leaves at most that folder; of two runs that build the same one, the later
    finds it there.

    Args:
      cfg: the source, its split and packing.
      split: 'train' or 'held_out'.
      tokenizer: makes the ids, or for `TokensConfig` made them.
      context_length: T, at least 2.
      cache: folder of the cache, where `cfg.cache` is None; None for none.
      keep_special: `Contexts.keep` is True for special tokens, too.
      log: takes a line every few seconds while the source is read.

    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: bad input, see `Documents` and `TokenDocuments`; or a damaged cache entry.
      OSError: the cache cannot be written.
    """
    if isinstance(cfg, TokensConfig) and isinstance(tokenizer, IdsOnly):
        tokenizer = tokenizer.with_special(cfg.separator, cfg.pad_id)
    reading = _Reading(cfg, split, tokenizer, context_length, keep_special, log)
    if (folder := cfg.cache or cache) is None:
        return reading.pack(None)
    root = pathlib.Path(folder).expanduser()
    key = reading.key()
    entry = root / key
    if (building := _begun(entry, _label(cfg))) is not None:
        try:
            _write(reading.pack(_FileSink(building)), building)
            _publish(building, entry)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise _unkept(error, root, _label(cfg)) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return _read(entry)


def _begun(entry: pathlib.Path, label: str) -> pathlib.Path | None:
    """A new folder beside the place of an entry; None where the entry is there."""
    root = entry.parent
    building = root / f".{entry.name}-{secrets.token_hex(8)}"
    try:
        if entry.is_dir():
            return None
        root.mkdir(parents=True, exist_ok=True)
        building.mkdir()  # not by tempfile, which would shut out whoever shares the cache
    except OSError as error:
        raise _unkept(error, root, label) from error
    return building


def _unkept(error: OSError, root: pathlib.Path, label: str) -> OSError:
    if error.errno in _FULL:
        told = f"{label}.cache: no space left for contexts in {root}; free some and run again, or "
        return OSError(error.errno, f"{told}set {label}.cache to another folder")
    return OSError(
        error.errno,
        f"{label}.cache = {str(root)!r} is no folder that can be written ({error.strerror}); give "
        "another, or None to keep nothing",
    )


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What `load_contexts` is asked for."""

    cfg: TextConfig | TokensConfig
    split: Split
    tokenizer: Tokenizer
    context_length: int
    keep_special: bool
    log: Log | None

    def pack(self, sink: Sink | None) -> Contexts:
        """Reads the source."""
        cfg, tokenizer = self.cfg, self.tokenizer
        progress = Progress(self.log, f"{_label(cfg)}.source = {cfg.source!r}, {self.split}")
        if self.log is not None and (told := _unbounded(cfg)) is not None:
            self.log(told)
        encoded: Iterable[Any]
        if isinstance(cfg, TextConfig):
            documents: Any = Documents(cfg, self.split, progress)
            encoded = encode_documents(documents, tokenizer)
        else:
            encoded = documents = TokenDocuments(cfg, self.split, tokenizer, progress)
        try:
            packed = pack_tokens(
                progress.packing(encoded),
                tokenizer,
                self.context_length,
                bos=cfg.bos,
                tails=cfg.tails,
                min_tail=cfg.min_tail,
                keep_special=self.keep_special,
                sink=sink,
            )
        except NoRowError as error:
            raise ValueError(f"{error}{_pieces(cfg)}") from error
        packed.left_out.update(documents.left_out)
        return packed

    def key(self) -> str:
        """Names the cache entry."""
        cfg, tokenizer = self.cfg, self.tokenizer
        settings = dataclasses.asdict(cfg)
        del settings["cache"]
        settings["bos"] = resolve_bos(tokenizer, cfg.bos)
        described = {
            "format": _FORMAT,
            "kind": type(cfg).__name__,
            "settings": settings,
            "state": _state(cfg),
            "split": self.split,
            "tokenizer": [tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eot_id],
            "context_length": self.context_length,
        }
        if self.keep_special:  # otherwise the key is as before there was a choice
            described["keep_special"] = True
        text = json.dumps(described, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _label(cfg: TextConfig | TokensConfig) -> str:
    return type(cfg).__name__.removesuffix("Config")


def _pieces(cfg: TextConfig | TokensConfig) -> str:
    """What to say of documents that are short because they are pieces of one file."""
    file = pathlib.Path(cfg.source).expanduser()
    of_text = isinstance(cfg, TextConfig) and file.name.lower().endswith(TEXT_SUFFIXES)
    if not of_text or not file.is_file():
        return ""
    return (
        f"; Text.source = {cfg.source!r} is one file, cut into pieces so that it can be split; the "
        "files of a folder are not cut"
    )


def _unbounded(cfg: TextConfig | TokensConfig) -> str | None:
    """What to say of a dataset of the hub that is read to its end, however large it is."""
    label, limit = _label(cfg), "max_bytes" if isinstance(cfg, TextConfig) else "max_tokens"
    if not cfg.source.startswith(HUB):
        return None
    told = f"{label}.source = {cfg.source!r} will be read to its end, however large it is"
    if getattr(cfg, limit) is None and cfg.max_documents is None:
        return f"{told}: {label}.{limit} (or {label}.max_documents) sets a limit"
    if cfg.take == "sample":
        return f"{told}: {label}.take = 'first' reads no further than {label}.{limit}"
    return None


def _state(cfg: TextConfig | TokensConfig) -> Any:
    """What changes when the source does."""
    if cfg.source == corpus.PYTHON and isinstance(cfg, TextConfig):
        digest = hashlib.sha256()
        for document in sorted(corpus.python_documents(), key=lambda d: d.name):
            digest.update(f"{document.name}\0{document.text}\0".encode())
        return digest.hexdigest()
    if cfg.source.startswith(HUB):
        folder = pathlib.Path(cfg.source.removeprefix(HUB)).expanduser()
        if folder.exists():
            return _files((f, str(f)) for f in sorted(folder.rglob("*")) if f.is_file())
        if cfg.revision is None:
            label = _label(cfg)
            raise ValueError(
                f"{label}.source = {cfg.source!r} may change, so what is kept of it could be out "
                f"of date: set {label}.revision to a commit, or keep nothing ({label}.cache = None)"
            )
        return cfg.revision
    if isinstance(cfg, TextConfig):
        return _files(corpus.source_files(cfg.source))
    offsets = cfg.offsets and pathlib.Path(cfg.offsets).expanduser()
    beside = [(offsets, "offsets")] if offsets and offsets.is_file() else []
    return _files([*id_files.token_files(cfg.source), *beside])


def _files(files: Iterable[tuple[pathlib.Path, str]]) -> list[tuple[str, int, int]]:
    found = [(name, path.stat()) for path, name in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


class _FileSink:
    """Appends rows to one .npy file a column, so that they need not fit into memory."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._open: dict[str, tuple[Any, np.ndarray]] = {}
        self._rows = 0

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Takes some more rows of every column."""
        for name, part in columns.items():
            if name not in self._open:
                file = open(self._folder / f"{name}.npy", "wb+")
                self._open[name] = (file, part[:0])
                _write_header(file, part[:0], 0)
            # Not by tofile, which does not say that a disk is full.
            self._open[name][0].write(np.ascontiguousarray(part).data)
        self._rows += len(part)

    def finish(self) -> dict[str, np.ndarray]:
        """Every column, memory-mapped."""
        for file, empty in self._open.values():
            begin = _write_header(file, empty, 0)
            if _write_header(file, empty, self._rows) != begin:
                raise AssertionError("numpy leaves room in a header for the first axis to grow")
            file.close()
        return {name: open_npy(self._folder / f"{name}.npy") for name in self._open}


def _write_header(file: Any, empty: np.ndarray, rows: int) -> int:
    """Writes the header of `rows` rows like `empty`'s; returns where the data begin."""
    described = np.lib.format.header_data_from_array_1_0(empty)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {**described, "shape": (rows, *empty.shape[1:])})
    return file.tell()


def _write(contexts: Contexts, folder: pathlib.Path) -> None:
    """Completes a folder that holds the columns of rows already."""
    plain: dict[str, Any] = {}
    arrays = []
    for field in dataclasses.fields(contexts):
        value = getattr(contexts, field.name)
        if isinstance(value, np.ndarray):
            arrays.append(field.name)
            if not (folder / f"{field.name}.npy").exists():
                np.save(folder / f"{field.name}.npy", value)
        elif field.name != "names":
            plain[field.name] = value
    (folder / _NAMES).write_text(json.dumps(contexts.names), encoding="utf-8")
    files = [*(f"{name}.npy" for name in arrays), _NAMES]
    sealed = {name: _sha256(folder / name) for name in files}
    meta = {"format": _FORMAT, "arrays": arrays, "plain": plain, "sha256": sealed}
    meta["seal"] = _seal(meta)
    (folder / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for name in [*files, _META]:
        descriptor = os.open(folder / name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _publish(building: pathlib.Path, entry: pathlib.Path) -> None:
    try:
        os.rename(building, entry)
    except OSError:
        if not (entry / _META).is_file():  # otherwise another run was faster, with equal contents
            raise


def _read(entry: pathlib.Path) -> Contexts:
    def damaged(what: str) -> ValueError:
        return ValueError(f"{entry}: {what}; delete this folder, it will be made again")

    try:
        meta = json.loads((entry / _META).read_text(encoding="utf-8"))
        seal = meta.pop("seal")
    except (OSError, ValueError, KeyError) as error:
        raise damaged(f"{_META} is missing or damaged") from error
    if seal != _seal(meta):
        raise damaged(f"{_META} is damaged")
    for name, wanted in meta["sha256"].items():
        if not (entry / name).is_file() or _sha256(entry / name) != wanted:
            raise damaged(f"{name} is missing or damaged")
    arrays = {name: open_npy(entry / f"{name}.npy") for name in meta["arrays"]}
    names = json.loads((entry / _NAMES).read_text(encoding="utf-8"))
    return Contexts(**arrays, **meta["plain"], names=tuple(names))


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
