"""Text to stored activations: runs a subject with taps at some sites and fills stores.

The contexts of a split are permuted once, then cut into shards; a shard is a pure function of the
store's spec and its index. A harvest that was killed, or that runs in several processes at once,
therefore only has to produce the shards that have no commit record yet. One forward pass feeds the
stores of all sites.
"""

import dataclasses
import errno
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.data.contexts import load_contexts
from saejax.data.corpus import TextConfig
from saejax.data.images import ImagesConfig
from saejax.data.loader import check_batch_size
from saejax.data.shards import NoStoreError, Store, StoreSpec, open_store
from saejax.data.storage import MAX_DROPPED, plan_shards
from saejax.data.tokens import Contexts
from saejax.subjects.base import Subject
from saejax.subjects.computation import check_computation, computation_of
from saejax.subjects.filling import Filling, Forward, make_forward
from saejax.subjects.request import HarvestConfig, open_subject, resolve_request

SPLITS = ("train", "held_out")

Log = Callable[[str], None]
_TELL: Log = logging.getLogger(__name__).info


def harvest(
    cfg: HarvestConfig,
    workdir: str | os.PathLike[str],
    log: Log = _TELL,
    *,
    subject: Subject | None = None,
    batch_size: int | None = None,
    forward: Forward | None = None,
    splits: Sequence[str] = SPLITS,
    process_index: int = 0,
    process_count: int = 1,
) -> dict[str, tuple[Store, ...]]:
    """Fills the stores of every site and split with the shards that have no commit record.

    Args:
      cfg: what to store.
      workdir: folder or TensorStore URL; see `HarvestConfig.folder`.
      log: takes one line of progress, every few seconds while text is read and shards are made.
      subject: the loaded subject, to save loading `cfg.subject` again; its weights are taken in the
        type they have.
      batch_size: rows of the batches that will be drawn; one that the shards cannot give is then
        refused before anything is stored.
      forward: the compiled pass (`filling.make_forward`), to save compiling it again.
      splits: which of 'train' and 'held_out' to store.
      process_index, process_count: each process, joined to others or not, ends when all shards of
        the splits are committed, whoever produced them; each takes other shards first.

    Returns:
      By site, named as asked for, the finished stores in the order of `splits`.

    Raises:
      ValueError: a request that the subject does not serve; stores of another spec there; NaN or
        infinite activations; max_bytes exceeded; a batch that shards cannot give.
      OSError: no space, or no permission to write.
    """
    subject = subject or open_subject(cfg, on_devices=True)
    asked, (cfg, subject) = cfg.all_sites, resolve_request(cfg, subject)
    _check_asked(cfg, subject, splits, os.fspath(workdir), log)
    texts = {split: read_contexts(cfg, subject, split, log) for split in splits}
    stores = _open_stores(cfg, subject, texts, os.fspath(workdir), batch_size, log)
    forward = forward or _forward(cfg, subject, stores[splits[0]][cfg.site].spec)
    for split, by_site in stores.items():
        contexts = texts[split]
        for store in by_site.values():
            store.write_documents(contexts.names)
        shards = sorted({shard for store in by_site.values() for shard in _missing(store)})
        filling = Filling(by_site, contexts, subject.tokenizer.bos_id, forward, log)
        filling.run(_own_first(shards, process_index, process_count))
        for store in by_site.values():
            manifest = store.finish(_provenance(cfg, subject, contexts, store.spec))
            if shards and len(manifest.get("computations", ())) > 1:
                log(f"harvest: {store.path} holds shards that are rounded in more than one way")
            if shards:
                log(_summary(store.spec, manifest))
    named = zip(asked, cfg.all_sites, strict=True)
    return {name: tuple(stores[split][site] for split in splits) for name, site in named}


def _forward(cfg: HarvestConfig, subject: Subject, spec: StoreSpec) -> Forward:
    return make_forward(
        subject,
        cfg.all_sites,
        cfg.dtype,
        batch=cfg.batch_contexts,
        contexts=spec.contexts_per_shard,
        subject_shards=cfg.subject_shards,
        first_position=spec.first_position,
    )


def _open_stores(
    cfg: HarvestConfig,
    subject: Subject,
    texts: Mapping[str, Contexts],
    root: str,
    batch_size: int | None,
    log: Log,
) -> dict[str, dict[str, Store]]:
    """The store of every split and site, created or continued once nothing speaks against it."""
    specs = {split: store_specs(cfg, subject, split, text) for split, text in texts.items()}
    if batch_size is not None and "train" in specs:
        check_batch_size(batch_size, specs["train"][cfg.site].contexts_per_shard)
    by_path = {
        f"{cfg.folder(root, site)}/{split}": spec
        for split, by_site in specs.items()
        for site, spec in by_site.items()
    }
    check_quota(cfg, sum(spec.bytes_per_shard * spec.n_shards for spec in by_path.values()))
    _check_space(root, by_path, log)
    computation = computation_of(cfg, subject)
    made = {path: open_store(path, spec, "w", computation) for path, spec in by_path.items()}
    check_computation(cfg, made.values(), computation, log)
    return {
        split: {site: made[f"{cfg.folder(root, site)}/{split}"] for site in by_site}
        for split, by_site in specs.items()
    }


def check_free_space(path: str, needed_bytes: int) -> int | None:
    """Free bytes where `path` is, None when remote; OSError when `needed_bytes` is more."""
    if "://" in path and not path.startswith("file://"):
        return None
    folder = os.path.abspath(os.path.expanduser(path.removeprefix("file://")))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{path}: the activations need {needed_bytes / 1e9:.2f} GB and {folder} has "
            f"{free / 1e9:.2f} GB free. Free some space, choose another place or fewer tokens.",
        )
    return free


def read_contexts(cfg: HarvestConfig, subject: Subject, split: str, log: Log = _TELL) -> Contexts:
    """The text of a split as contexts of tokens; `log` takes a line every few seconds."""
    if isinstance(cfg.text, ImagesConfig):  # the subject has them, see `resolve_request`
        return subject.tokenizer.contexts(split, cfg.context_length, log)
    try:
        found = load_contexts(
            cfg.text,
            split,
            subject.tokenizer,
            cfg.context_length,
            keep_special=cfg.keep_special,
            log=log,
        )
        if subject.tokenizer.vocab_size > subject.vocab_size:
            subject.check_tokens(found.tokens)  # ids that only the tokenizer knows, see base
        return found
    except ValueError as error:
        kind = "Text" if isinstance(cfg.text, TextConfig) else "Tokens"
        where = f"{kind}.source = {cfg.text.source!r}, {split} split"
        raise ValueError(f"{where}: {error}") from error


def store_specs(
    cfg: HarvestConfig, subject: Subject, split: str, contexts: Contexts
) -> dict[str, StoreSpec]:
    """The spec of each site's store of a split."""
    goal = _goal(cfg, split, len(contexts.tokens))
    per_shard, n_shards = plan_shards(len(contexts.tokens), goal, cfg.contexts_per_shard)
    found = contexts.fingerprint
    return {
        site: _spec(cfg, subject, split, site, found, per_shard, n_shards) for site in cfg.all_sites
    }


def _spec(
    cfg: HarvestConfig,
    subject: Subject,
    split: str,
    site: str,
    text_fingerprint: str,
    contexts_per_shard: int,
    n_shards: int,
) -> StoreSpec:
    return StoreSpec(
        subject=subject.name,
        subject_fingerprint=subject.fingerprint,
        text_fingerprint=text_fingerprint,
        split=split,
        site=site,
        d_model=subject.width(site),
        context_length=cfg.context_length,
        first_position=cfg.first_position,
        contexts_per_shard=contexts_per_shard,
        n_shards=n_shards,
        max_norm_ratio=cfg.max_norm_ratio,
        compute_dtype=cfg.dtype,
        seed=cfg.seed,
    )


def _summary(spec: StoreSpec, manifest: Mapping[str, Any]) -> str:
    left_out = {reason: n for reason, n in manifest["left_out"].items() if n}
    norms = [norm for norm in manifest["norm_by_position"] if norm is not None]
    return (
        f"harvest {spec.split} {spec.site}: {manifest['rows']:,} activations; left out: "
        + ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in left_out.items())
        + f"; mean norm {manifest['mean_norm']:.4g}, by position {min(norms):.4g} to "
        f"{max(norms):.4g}"
    )


def _own_first(shards: list[int], index: int, count: int) -> list[int]:
    """The shards of one process, then everyone's, both at random.

    So processes that know nothing of each other seldom work on the same one.
    """
    generator = np.random.default_rng()
    own, others = shards[index::count], [s for i, s in enumerate(shards) if i % count != index]
    return [*generator.permutation(own).tolist(), *generator.permutation(others).tolist()]


def _goal(cfg: HarvestConfig, split: str, available: int) -> int:
    """Contexts that hold the tokens asked for, at most those that there are."""
    asked = _asked(cfg, split)
    return available if asked is None else min(available, asked)


def _asked(cfg: HarvestConfig, split: str) -> int | None:
    """Contexts that hold the tokens asked for; None for all of the text."""
    tokens = cfg.tokens if split == "train" else cfg.held_out_tokens
    rows = cfg.context_length - cfg.first_position
    return None if tokens is None else -(-tokens // rows)


def _provenance(
    cfg: HarvestConfig, subject: Subject, contexts: Contexts, spec: StoreSpec
) -> dict[str, Any]:
    stored = spec.n_shards * spec.contexts_per_shard
    goal = _goal(cfg, spec.split, len(contexts.tokens))
    return {
        "family": subject.family,
        "revision": subject.revision,
        "tokenizer_fingerprint": subject.tokenizer.fingerprint,
        "lead": contexts.lead,  # tokens put before the text of each context
        "keep_special": cfg.keep_special,
        "weights_dtype": subject.weights_dtype if isinstance(subject, Subject) else cfg.dtype,
        "text": dataclasses.asdict(cfg.text),
        "text_bytes": contexts.bytes_total,
        "text_left_out": contexts.left_out,
        "contexts_available": len(contexts.tokens),
        "contexts_wanted": goal,
        "contexts_dropped": max(0, goal - stored),  # they fill no shard
        "tokens_dropped_in_tails": contexts.dropped_tokens,
    }


def _missing(store: Store) -> list[int]:
    return sorted(set(range(store.spec.n_shards)) - set(store.committed()))


def missing_at(path: str, spec: StoreSpec) -> list[int]:
    """Shards of a spec that a place lacks, where there need not be a store; nothing is created.

    Raises:
      ValueError: there is a store of another spec.
      FileNotFoundError: the store there lacks a file.
    """
    try:
        return _missing(open_store(path, spec))
    except NoStoreError:  # a store that lacks another file is damaged, and its shards are there
        return list(range(spec.n_shards))


def check_quota(cfg: HarvestConfig, needed: int) -> None:
    """ValueError when the stores would take more than `Harvest.max_bytes`."""
    if cfg.max_bytes is not None and needed > cfg.max_bytes:
        raise ValueError(
            f"Harvest.max_bytes = {cfg.max_bytes}: the activations need {needed} bytes. Raise it, "
            "or store fewer tokens."
        )


def check_asked(cfg: HarvestConfig, subject: Subject, splits: Sequence[str] = SPLITS) -> int:
    """Bytes that the tokens asked for need at least, known before any text is read.

    Nothing is counted of a split of which all is stored.

    Raises:
      ValueError: more than `Harvest.max_bytes`, which reading the text would only tell later.
    """
    needed = 0
    for split in splits:
        fewest = int((1 - MAX_DROPPED) * (_asked(cfg, split) or 0))  # see `plan_shards`
        for site in cfg.all_sites:
            needed += fewest * _spec(cfg, subject, split, site, "", 1, 1).bytes_per_shard
    check_quota(cfg, needed)
    return needed


def _check_asked(
    cfg: HarvestConfig, subject: Subject, splits: Sequence[str], root: str, log: Log
) -> None:
    """What can be told of quota and space before any text is read, which may take hours."""
    needed = check_asked(cfg, subject, splits)
    free = check_free_space(root, 0)
    if free is None or needed <= free:
        return
    places = [f"{cfg.folder(root, site)}/{split}" for split in splits for site in cfg.all_sites]
    if not any(_is_store(place) for place in places):
        # No error: how much text there is, and so how much is stored, is not known yet.
        log(
            f"harvest: {root} has {free / 1e9:.1f} GB free, and the tokens asked for need "
            f"{needed / 1e9:.1f} GB; it will fail once the text is read, unless that is shorter"
        )


def _is_store(path: str) -> bool:
    try:
        open_store(path)
    except NoStoreError:
        return False
    except (OSError, ValueError):
        pass  # told when it is opened for writing
    return True


def _check_space(root: str, specs: Mapping[str, StoreSpec], log: Log) -> None:
    """Before a store is made: one left by a refused harvest would refuse the corrected one."""
    needed = sum(spec.bytes_per_shard * len(missing_at(path, spec)) for path, spec in specs.items())
    free = check_free_space(root, needed)
    if needed:
        place = "" if free is None else f", {free / 1e9:.1f} GB free"
        log(f"harvest: {needed / 1e6:.1f} MB of activations to store at {root}{place}")
