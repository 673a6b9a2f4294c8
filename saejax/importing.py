"""Activations made elsewhere to stored activations: contexts permuted, split and cut into shards.

As in a harvest, a shard is a pure function of the source, the settings and its index, so an import
that was killed, or that several processes make at once, only has to produce the shards that have
no commit record yet. The source is read in passes: each takes, in the order of the files, the
contexts of as many shards as fit in memory.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from saejax.data.foreign.formats import open_foreign, state_of
from saejax.data.foreign.interface import FLOATS, Foreign, Part, Wanted
from saejax.data.foreign.reading import Reader
from saejax.data.layout import CONTEXT_STREAM, MASKED, StoreSpec, permutation, random_keys
from saejax.data.shards import NoStoreError, Store, open_store
from saejax.data.storage import plan_shards
from saejax.data.store_place import check_place
from saejax.subjects.harvest import SPLITS, check_free_space, missing_at
from saejax.subjects.hf import load_subject

MAX_NORM_RATIO = 10.0
UNKNOWN = "unknown"
# Of `--subject`. The store says so: a subject of PyTorch is loaded by what it says, and has another
# fingerprint in another type.
SUBJECT_DTYPE = "float32"
_SPLIT_STREAM = 7  # of `layout.random_keys`: which contexts are held out
_PER_SHARD = {True: 1024, False: 8192}  # contexts, of several tokens or of one
_LOG_SECONDS = 5.0
_WRITERS = 2
_BOS, _SPECIAL, _PADDING = (MASKED.index(reason) for reason in ("bos", "special", "padding"))

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What is imported, and how.

    Attributes:
      source: a file or a folder.
      width: width that the activations must have.
      format: one of `formats.FORMATS`; None finds out.
      field, tokens: see `interface.Wanted`.
      dtype: float type that the source must have; None takes any.
      split: 'both' holds some contexts out; 'train' or 'held_out' puts all into that one.
      held_out_percent: share of contexts held out, drawn for (seed, number of the context).
      subject: the model that the activations come from, as for `Harvest.subject`: its fingerprint
        lets `Stored.subject` evaluate the loss, its special tokens are masked, and tokens and
        site are checked against it (of one that takes images, the site alone; it has no
        special tokens). None: not known.
      site: name of the site; None for the format's, or 'unknown'.
      first_position: positions of a context before it are not stored; None for the format's, 0.
      bos, special, pad: token ids whose activations are not stored.
      max_norm_ratio: rows with a norm above this multiple of the median (of their shard; of the
        source, where it has no contexts) are left out; 0 keeps them. None is 10, or 0 for stores
        exported by saejax, from which they are gone.
      contexts_per_shard: exactly so many contexts a shard (at most so many of those held out by
        'both'); what fills none is dropped. None takes at most 1024 (8192 where rows have no
        context), and drops no more than 5 %.
      max_bytes: refuse to store more.
      memory: bytes of activations held at once, about.
      seed: seed of the permutation, of the split and of the rows' order.
    """

    source: str
    width: int
    format: str | None = None
    field: str | None = None
    tokens: str | None = None
    dtype: str | None = None
    split: Literal["both", "train", "held_out"] = "both"
    held_out_percent: float = 5.0
    subject: str | None = None
    site: str | None = None
    first_position: int | None = None
    bos: int | None = None
    special: tuple[int, ...] = ()
    pad: int | None = None
    max_norm_ratio: float | None = None
    contexts_per_shard: int | None = None
    max_bytes: int | None = None
    memory: int = 1 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "contexts_per_shard", "max_bytes", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"import {name} = {value}: must be at least 1")
        if self.dtype is not None and self.dtype not in FLOATS:
            raise ValueError(f"import dtype = {self.dtype!r}: allowed are {', '.join(FLOATS)}")
        if self.split not in ("both", *SPLITS):
            raise ValueError(f"import split = {self.split!r}: 'both', 'train' or 'held_out'")
        if not 0 < self.held_out_percent < 100:
            raise ValueError(
                f"import held_out_percent = {self.held_out_percent}: above 0 and below 100; "
                "--split=train holds nothing out"
            )
        ratio = self.max_norm_ratio
        if ratio is not None and ratio != 0 and not ratio > 1:
            raise ValueError(f"import max_norm_ratio = {ratio}: must be above 1, or 0 for none")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"import seed = {self.seed}: must be in [0, 2**63)")


def import_activations(
    cfg: ImportConfig,
    root: str | os.PathLike[str],
    log: Log = logging.getLogger(__name__).info,
) -> dict[str, Store]:
    """Fills the stores 'train' and 'held_out' under `root` with the shards that are missing.

    A refused import leaves nothing. Where a store was begun before the fault was found, the error
    says what to delete.

    Args:
      cfg: what to import.
      root: folder or TensorStore URL; `Stored.path` of a training run names it.
      log: takes one line of progress.

    Returns:
      The finished stores by split.

    Raises:
      FileNotFoundError: no such source.
      ValueError: it is not as asked for, unsound, holds NaN or infinity, or has too few rows;
        stores of another source there.
      OSError: no space, or no permission.
    """
    root = os.fspath(root).rstrip("/")
    check_place(root, "import store")
    wanted = Wanted(field=cfg.field, tokens=cfg.tokens)
    format, foreign = open_foreign(cfg.source, wanted, cfg.format)
    source = _Source(cfg, format, foreign, log)
    ids = {split: source.of_split(split) for split in SPLITS if cfg.split in ("both", split)}
    specs = {split: source.spec(split, len(found)) for split, found in ids.items()}
    needed = sum(spec.bytes_per_shard * spec.n_shards for spec in specs.values())
    if cfg.max_bytes is not None and needed > cfg.max_bytes:
        raise ValueError(f"import max_bytes = {cfg.max_bytes}: the store needs {needed}")
    missing = {split: missing_at(f"{root}/{split}", spec) for split, spec in specs.items()}
    check_free_space(root, sum(specs[s].bytes_per_shard * len(missing[s]) for s in specs))
    stores = {}
    for split, spec in specs.items():
        store = stores[split] = source.fill(f"{root}/{split}", spec, ids[split], missing[split])
        manifest = store.finish(source.provenance(ids[split], spec))
        if missing[split]:
            log(_summary(spec, manifest))
    return stores


class _Source:
    """A foreign source with what is asked for of it."""

    def __init__(self, cfg: ImportConfig, format: str, foreign: Foreign, log: Log) -> None:
        self._cfg, self._format, self._foreign, self._log = cfg, format, foreign, log
        self._parts = foreign.parts
        _check_parts(cfg, self._parts)
        _, self._length, self._width = self._parts[0].shape
        self.documents = foreign.documents or tuple(part.name for part in self._parts)
        known = foreign.known
        self._subject = str(known.get("subject", UNKNOWN))
        self._fingerprint = str(known.get("subject_fingerprint", UNKNOWN))
        self._compute_dtype = str(known.get("compute_dtype", self._parts[0].dtype))
        self._site = cfg.site or str(known.get("site", UNKNOWN))
        first = cfg.first_position
        self._first = int(known.get("first_position", 0)) if first is None else first
        self._codes = dict.fromkeys(cfg.special, _SPECIAL)
        vocab_size = None if cfg.subject is None else self._know(cfg.subject)
        self._codes |= {t: c for t, c in ((cfg.bos, _BOS), (cfg.pad, _PADDING)) if t is not None}
        if self._codes and not self._parts[0].tokens:
            raise ValueError(f"{cfg.source} has no token ids, so none can be left out")
        ratio = cfg.max_norm_ratio
        self._ratio = (0 if foreign.filtered else MAX_NORM_RATIO) if ratio is None else ratio
        self._state = state_of(foreign)
        self._reader = Reader(self._parts, self._codes, vocab_size)
        if self._reader.count >= 2**32:
            raise ValueError(f"{cfg.source} has {self._reader.count} contexts: at most 2**32 - 1")
        self._left_out: dict[str, int] = {}
        self._opened: list[str] = []  # stores that there are
        self._kept = np.arange(self._reader.count)
        if self._length == 1:
            log(f"import: looks at {self._reader.count:,} rows for NaN, masks and norms")
            self._kept, self._left_out = self._reader.sound_rows(self._ratio)

    def _know(self, name: str) -> int | None:
        """Takes over what the subject says; its vocabulary, or None if it takes images."""
        subject = load_subject(name, dtype=SUBJECT_DTYPE)
        pixels = getattr(subject, "takes", "tokens") == "pixels"
        if not pixels and not self._parts[0].tokens:
            raise ValueError(
                f"{self._cfg.source} has no token ids, so subject {subject.name!r} cannot be run "
                "on them; leave out --subject"
            )
        if subject.width(self._site) != self._width:
            raise ValueError(
                f"site {self._site} of {subject.name} is {subject.width(self._site)} wide, the "
                f"activations of {self._cfg.source} are {self._width}"
            )
        self._subject, self._fingerprint = subject.name, subject.fingerprint
        self._compute_dtype = SUBJECT_DTYPE
        if pixels:
            return None  # contexts are images: what stands for token ids are their numbers
        tokenizer = subject.tokenizer
        if not self._foreign.filtered:
            self._codes |= dict.fromkeys(tokenizer.special_ids, _SPECIAL)
            if tokenizer.bos_id is not None:
                self._codes[tokenizer.bos_id] = _BOS
        return min(tokenizer.vocab_size, subject.vocab_size)

    def of_split(self, split: str) -> np.ndarray:
        """Numbers of the contexts of a split, ascending."""
        count = len(self._kept)
        if self._cfg.split != "both":
            return self._kept
        wanted = round(count * self._cfg.held_out_percent / 100)
        held_out = min(max(1, wanted), count - 1)
        if not held_out:
            raise ValueError(
                f"{self._cfg.source} has one context, too few for two splits; give --split=train"
            )
        keys = random_keys((self._reader.count,), self._cfg.seed, _SPLIT_STREAM)[self._kept]
        order = np.argsort(keys, kind="stable")
        return self._kept[np.sort(order[:held_out] if split == "held_out" else order[held_out:])]

    def spec(self, split: str, count: int) -> StoreSpec:
        """The spec of a split's store."""
        cfg = self._cfg
        size = cfg.contexts_per_shard
        # Those held out beside the training set may be few, and no batch is drawn from them.
        beside = cfg.split == "both" and split == "held_out"
        if size is None or beside:
            size, n_shards = plan_shards(count, count, size or _PER_SHARD[self._length > 1])
        else:
            n_shards = count // size
            if not n_shards:
                raise ValueError(
                    f"the {split} split has {count} contexts, fewer than a shard of "
                    f"contexts_per_shard = {size}: give at most {count}"
                )
        return StoreSpec(
            subject=self._subject,
            subject_fingerprint=self._fingerprint,
            text_fingerprint=self._digest(split),
            split=split,
            site=self._site,
            d_model=self._width,
            context_length=self._length,
            first_position=self._first,
            contexts_per_shard=size,
            n_shards=n_shards,
            max_norm_ratio=self._ratio or None if self._length > 1 else None,
            compute_dtype=self._compute_dtype,
            seed=cfg.seed,
        )

    def provenance(self, ids: np.ndarray, spec: StoreSpec) -> dict[str, Any]:
        """What the manifest says of the origin."""
        return {
            "imported": self._format,
            "source": self._cfg.source,
            "source_state": self._state,
            "files": len(self._parts),
            "field": self._parts[0].field,
            "dtype": self._parts[0].dtype,
            "tokens": self._parts[0].tokens,
            "lead": int(self._foreign.known.get("lead", 0)),
            "left_out_before": self._left_out,
            "contexts_available": len(ids),
            "contexts_dropped": len(ids) - spec.n_shards * spec.contexts_per_shard,
        }

    def fill(self, path: str, spec: StoreSpec, ids: np.ndarray, missing: list[int]) -> Store:
        """Produces some shards of a store."""
        store = self._open(path, spec, "r")
        order = ids[permutation(len(ids), spec.seed, CONTEXT_STREAM)]
        # In any order, so that processes that know nothing of each other seldom do the same.
        shards = np.random.default_rng().permutation(missing).tolist()
        at_once = max(1, self._cfg.memory // (_WRITERS * spec.bytes_per_shard))
        began = logged = time.monotonic()
        done = 0
        with concurrent.futures.ThreadPoolExecutor(_WRITERS) as writers:
            writing: list[concurrent.futures.Future] = []
            while done < len(shards):
                some = shards[done : done + at_once]
                some = [s for s in some if not (store and store.is_committed(s))]
                done += at_once
                if not some:  # made by another process meanwhile
                    continue
                n = spec.contexts_per_shard
                found = self._read(spec, np.concatenate([order[s * n : (s + 1) * n] for s in some]))
                # Made only now that the first are sound: a refused import leaves nothing.
                store = store or self._open(path, spec, "w")
                for future in writing:
                    future.result()
                writing = [
                    writers.submit(store.write_shard, shard, **found[i])
                    for i, shard in enumerate(some)
                ]
                now = time.monotonic()
                if now - logged > _LOG_SECONDS:
                    share = min(1.0, done / len(shards))
                    left = round((now - began) * (1 - share) / share)
                    self._log(f"import {spec.split}: {share:.0%} of the shards, {left} s left")
                    logged = now
            for future in writing:
                future.result()
        return store

    def _open(self, path: str, spec: StoreSpec, mode: str) -> Store | None:
        try:
            store = open_store(path, spec, mode)
        except NoStoreError:
            return None
        store.write_documents(self.documents)
        self._opened.append(store.path)
        return store

    def _read(self, spec: StoreSpec, ids: np.ndarray) -> dict[int, dict[str, Any]]:
        """What `Store.write_shard` wants of some shards, by their place among them."""
        try:
            found = self._reader.gather(ids, spec.first_position)
        except ValueError as error:
            if not self._opened:
                raise
            raise ValueError(
                f"{error}; before the mended source is imported, delete what was begun: "
                f"{' and '.join(self._opened)}"
            ) from error
        n, columns = spec.contexts_per_shard, {}
        for i in range(len(ids) // n):
            cut = slice(i * n, (i + 1) * n)
            context, document, offset = found.origin[cut].T
            columns[i] = {
                "acts": found.acts[cut],
                "tokens": found.tokens[cut],
                "context": context,
                "document": document,
                "offset": offset,
                "masked": found.masked[cut],
            }
        return columns

    def _digest(self, split: str) -> str:
        """Fingerprint of which contexts there are: the source, the split and the masks."""
        cfg = self._cfg
        share = cfg.held_out_percent if cfg.split == "both" else None
        described: Mapping[str, Any] = {
            "state": self._state,
            "format": self._format,
            "split": [cfg.split, split, share],
            "codes": sorted(self._codes.items()),
            "ratio": self._ratio,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _check_parts(cfg: ImportConfig, parts: tuple[Part, ...]) -> None:
    first = parts[0]
    for part in parts:
        if part.shape[2] != cfg.width:
            what = f"{part.path}: {part.field!r}" if part.field else part.path
            raise ValueError(f"{what} is {part.shape[2]} wide, and --width is {cfg.width}")
        if cfg.dtype is not None and part.dtype != cfg.dtype:
            raise ValueError(f"{part.path} is {part.dtype}, and --dtype is {cfg.dtype}")
        for what, ours, theirs in (
            ("tokens a context", part.shape[1], first.shape[1]),
            ("type", part.dtype, first.dtype),
            ("field", part.field, first.field),
            ("token ids", part.tokens, first.tokens),
        ):
            if ours != theirs:
                raise ValueError(
                    f"files disagree: {what} of {part.path} is {ours}, of {first.path} {theirs}; "
                    "import them into stores of their own"
                )


def _summary(spec: StoreSpec, manifest: Mapping[str, Any]) -> str:
    found = manifest["left_out"] | manifest["provenance"]["left_out_before"]
    left_out = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in found.items() if n]
    dropped = manifest["provenance"]["contexts_dropped"]
    return (
        f"import {spec.split}: {manifest['rows']:,} activations of width {spec.d_model} in "
        f"{spec.n_shards} shards; mean norm {manifest['mean_norm']:.4g}; left out: "
        + (", ".join(left_out) or "none")
        + (f"; {dropped:,} contexts fill no shard" if dropped else "")
    )
