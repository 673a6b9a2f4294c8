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
from typing import Any, Literal

import numpy as np

from saejax.data.contexts import load_contexts
from saejax.data.corpus import TextConfig
from saejax.data.loader import check_batch_size
from saejax.data.shards import Store, StoreSpec, open_store
from saejax.data.token_arrays import TokensConfig
from saejax.data.tokens import Contexts
from saejax.subjects.base import Subject
from saejax.subjects.filling import FIRST_POSITION, Filling, Forward, make_forward
from saejax.subjects.hf import load_subject

SPLITS = ("train", "held_out")
MAX_DROPPED = 0.05

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Which activations of which subject model on which text are stored.

    Attributes:
      subject: 'embedded', a folder in the Hugging Face layout, or a hub id.
      site: where the subject is tapped; `Subject.sites()` lists the names.
      sites: further sites to store from the same forward passes. With any of them the stores of
        each site, `site` too, are in a folder of its name.
      context_length: tokens a context, T; each gives T - 1 activations but for masked ones (BOS,
        special tokens, padding).
      max_norm_ratio: activations whose norm is above this multiple of the median norm of their
        shard are left out, because a few positions of some models are hundreds of times larger
        than the rest; None keeps them.
      tokens: activations to store for training, before masked ones come off; None stores all of
        the text.
      held_out_tokens: the same for the held-out split.
      contexts_per_shard: at most so many contexts a shard (a power of two is used: the largest
        that leaves out no more than 5 % of the contexts). A chunk has as many rows, and a batch
        must be a multiple or a divisor of it.
      batch_contexts: contexts a forward pass, on each device of a process (or each group of
        `subject_shards`).
      subject_shards: devices that share one copy of the subject's weights.
      max_bytes: refuse to store more than this; None asks only for free space.
      dtype: precision of the forward pass; what is stored is always bfloat16.
      seed: seed of the permutation of contexts and of the rows' order in a shard.
      text: the text, or token ids made elsewhere.
    """

    subject: str = "embedded"
    site: str = "1.resid_post"
    sites: tuple[str, ...] = ()
    context_length: int = 64
    tokens: int | None = None
    held_out_tokens: int | None = None
    max_norm_ratio: float | None = 10.0
    contexts_per_shard: int = 1024
    batch_contexts: int = 64
    subject_shards: int = 1
    max_bytes: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    text: TextConfig | TokensConfig = dataclasses.field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise ValueError(
                f"Harvest.context_length = {self.context_length}: at least 2, because the first "
                "position is not stored."
            )
        for name in ("contexts_per_shard", "batch_contexts", "subject_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"Harvest.{name} = {getattr(self, name)}: must be at least 1.")
        for name in ("tokens", "held_out_tokens", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Harvest.{name} = {value}: must be at least 1, or None.")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise ValueError(
                f"Harvest.max_norm_ratio = {self.max_norm_ratio}: must be above 1, or None."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"Harvest.dtype = {self.dtype!r}: 'float32' or 'bfloat16'.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Harvest.seed = {self.seed}: must be in [0, 2**63).")

    @property
    def all_sites(self) -> tuple[str, ...]:
        """`site` and `sites`, each once."""
        return tuple(dict.fromkeys((self.site, *self.sites)))

    def folder(self, root: str | os.PathLike[str], site: str) -> str:
        """Where the stores 'train' and 'held_out' of a site are, under the harvest's own place."""
        root = os.fspath(root).rstrip("/")
        return f"{root}/{site}" if len(self.all_sites) > 1 else root


def harvest(
    cfg: HarvestConfig,
    workdir: str | os.PathLike[str],
    log: Log = logging.getLogger(__name__).info,
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
      log: takes one line of progress.
      subject: the loaded subject, to save loading `cfg.subject` again.
      batch_size: rows of the batches that will be drawn; one that the shards cannot give is then
        refused before anything is stored.
      forward: the compiled pass (`filling.make_forward`), to save compiling it again.
      splits: which of 'train' and 'held_out' to store.
      process_index, process_count: each process, joined to others or not, ends when all shards of
        the splits are committed, whoever produced them; each takes other shards first.

    Returns:
      By site, the finished stores in the order of `splits`.

    Raises:
      ValueError: no such site; a context longer than the subject's; stores of another spec there;
        NaN or infinite activations; max_bytes exceeded; a batch that shards cannot give.
      OSError: no space, or no permission to write.
    """
    subject = subject or load_subject(cfg.subject)
    check_request(cfg, subject)
    texts = {split: read_contexts(cfg, subject, split) for split in splits}
    stores = _open_stores(cfg, subject, texts, os.fspath(workdir), batch_size)
    _check_space(os.fspath(workdir), [x for of in stores.values() for x in of.values()], log)
    forward = forward or make_forward(
        subject,
        cfg.all_sites,
        cfg.dtype,
        batch=cfg.batch_contexts,
        contexts=stores[splits[0]][cfg.site].spec.contexts_per_shard,
        subject_shards=cfg.subject_shards,
    )
    for split, by_site in stores.items():
        contexts = texts[split]
        for store in by_site.values():
            store.write_documents(contexts.names)
        shards = sorted({shard for store in by_site.values() for shard in _missing(store)})
        filling = Filling(by_site, contexts, subject.tokenizer.bos_id, forward, log)
        filling.run(_own_first(shards, process_index, process_count))
        for store in by_site.values():
            manifest = store.finish(_provenance(cfg, subject, contexts, store.spec))
            if shards:
                log(_summary(store.spec, manifest))
    return {site: tuple(stores[split][site] for split in splits) for site in cfg.all_sites}


def check_request(cfg: HarvestConfig, subject: Subject) -> None:
    """ValueError when the subject has no such site, or fewer positions than a context."""
    for site in cfg.all_sites:
        subject.check_site(site)
    if cfg.context_length > subject.max_context:
        raise ValueError(
            f"Harvest.context_length = {cfg.context_length}: subject {subject.name!r} has "
            f"{subject.max_context} positions; give at most that."
        )


def _open_stores(
    cfg: HarvestConfig,
    subject: Subject,
    texts: Mapping[str, Contexts],
    root: str,
    batch_size: int | None,
) -> dict[str, dict[str, Store]]:
    """The store of every split and site, created or continued once nothing speaks against it."""
    specs = {split: store_specs(cfg, subject, split, text) for split, text in texts.items()}
    if batch_size is not None and "train" in specs:
        check_batch_size(batch_size, specs["train"][cfg.site].contexts_per_shard)
    everything = [spec for by_site in specs.values() for spec in by_site.values()]
    check_quota(cfg, sum(spec.bytes_per_shard * spec.n_shards for spec in everything))
    return {
        split: {
            site: open_store(f"{cfg.folder(root, site)}/{split}", spec, "w")
            for site, spec in by_site.items()
        }
        for split, by_site in specs.items()
    }


def plan_shards(available: int, goal: int, contexts_per_shard: int) -> tuple[int, int]:
    """Contexts a shard and the number of shards, for `goal` of `available` contexts.

    Takes the largest power of two, at most `contexts_per_shard`, that comes within 5 % of the
    goal in whole shards.
    """
    size = 1 << (contexts_per_shard.bit_length() - 1)
    while size > 1:
        n_shards = min(max(1, round(goal / size)), available // size)
        if abs(n_shards * size - goal) <= MAX_DROPPED * goal:
            return size, n_shards
        size //= 2
    return 1, goal


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


def read_contexts(cfg: HarvestConfig, subject: Subject, split: str) -> Contexts:
    """The text of a split as contexts of tokens."""
    try:
        return load_contexts(cfg.text, split, subject.tokenizer, cfg.context_length)
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
    return {
        site: StoreSpec(
            subject=subject.name,
            subject_fingerprint=subject.fingerprint,
            text_fingerprint=contexts.fingerprint,
            split=split,
            site=site,
            d_model=subject.width(site),
            context_length=cfg.context_length,
            first_position=FIRST_POSITION,
            contexts_per_shard=per_shard,
            n_shards=n_shards,
            max_norm_ratio=cfg.max_norm_ratio,
            compute_dtype=cfg.dtype,
            seed=cfg.seed,
        )
        for site in cfg.all_sites
    }


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
    tokens = cfg.tokens if split == "train" else cfg.held_out_tokens
    rows = cfg.context_length - FIRST_POSITION
    return available if tokens is None else min(available, -(-tokens // rows))


def _provenance(
    cfg: HarvestConfig, subject: Subject, contexts: Contexts, spec: StoreSpec
) -> dict[str, Any]:
    stored = spec.n_shards * spec.contexts_per_shard
    goal = _goal(cfg, spec.split, len(contexts.tokens))
    return {
        "family": subject.family,
        "revision": subject.revision,
        "tokenizer_fingerprint": subject.tokenizer.fingerprint,
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


def check_quota(cfg: HarvestConfig, needed: int) -> None:
    """ValueError when the stores would take more than `Harvest.max_bytes`."""
    if cfg.max_bytes is not None and needed > cfg.max_bytes:
        raise ValueError(
            f"Harvest.max_bytes = {cfg.max_bytes}: the activations need {needed} bytes. Raise it, "
            "or store fewer tokens."
        )


def _check_space(root: str, stores: Sequence[Store], log: Log) -> None:
    needed = sum(store.spec.bytes_per_shard * len(_missing(store)) for store in stores)
    free = check_free_space(root, needed)
    if needed:
        place = "" if free is None else f", {free / 1e9:.1f} GB free"
        log(f"harvest: {needed / 1e6:.1f} MB of activations to store at {root}{place}")
