"""Text to stored activations: runs a subject with a tap at one site and fills two stores.

The contexts of a split are permuted once, then cut into shards; a shard is a pure function of the
store's spec and its index. A harvest that was killed, or that runs in several processes at once,
therefore only has to produce the shards that have no commit record yet.
"""

import concurrent.futures
import dataclasses
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from saejax.data.corpus import TextConfig, read_documents
from saejax.data.layout import CONTEXT_STREAM, permutation
from saejax.data.loader import check_batch_size
from saejax.data.shards import Store, StoreSpec, open_store
from saejax.data.tokens import Contexts, pack
from saejax.subjects.base import Subject
from saejax.subjects.hf import load_subject

SPLITS = ("train", "held_out")
FIRST_POSITION = 1  # the first position's norm is unlike all others, so it is never stored
MAX_DROPPED = 0.05
_LOG_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Which activations of which subject model on which text are stored.

    Attributes:
      subject: 'embedded', a folder in the Hugging Face layout, or a hub id.
      site: where the subject is tapped; `Subject.sites()` lists the names.
      context_length: tokens a context, T; each gives T - 1 activations.
      tokens: activations to store for training; None stores all of the text.
      held_out_tokens: the same for the held-out split.
      contexts_per_shard: at most so many contexts a shard (a power of two is used: the largest
        that leaves out no more than 5 % of the contexts). A chunk has as many rows, and a batch
        must be a multiple or a divisor of it.
      batch_contexts: contexts a forward pass.
      max_bytes: refuse to store more than this; None asks only for free space.
      dtype: precision of the forward pass; what is stored is always bfloat16.
      seed: seed of the permutation of contexts and of the rows' order in a shard.
      text: the text.
    """

    subject: str = "embedded"
    site: str = "1.resid_post"
    context_length: int = 64
    tokens: int | None = None
    held_out_tokens: int | None = None
    contexts_per_shard: int = 1024
    batch_contexts: int = 64
    max_bytes: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    text: TextConfig = dataclasses.field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise ValueError(
                f"Harvest.context_length = {self.context_length}: at least 2, because the first "
                "position is not stored."
            )
        for name in ("contexts_per_shard", "batch_contexts"):
            if getattr(self, name) < 1:
                raise ValueError(f"Harvest.{name} = {getattr(self, name)}: must be at least 1.")
        for name in ("tokens", "held_out_tokens", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Harvest.{name} = {value}: must be at least 1, or None.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"Harvest.dtype = {self.dtype!r}: 'float32' or 'bfloat16'.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Harvest.seed = {self.seed}: must be in [0, 2**63).")


def harvest(
    cfg: HarvestConfig,
    workdir: str | os.PathLike[str],
    log: Callable[[str], None] = logging.getLogger(__name__).info,
    *,
    subject: Subject | None = None,
    batch_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[Store, Store]:
    """Fills `workdir/train` and `workdir/held_out`; produces only shards without a commit record.

    Args:
      cfg: what to store.
      workdir: folder or TensorStore URL.
      log: takes one line of progress.
      subject: the loaded subject, to save loading `cfg.subject` again.
      batch_size: rows of the batches that will be drawn; one that the shards cannot give is then
        refused before anything is stored.
      process_index, process_count: processes start at different shards; each ends when all shards
        of both splits are committed, whoever produced them.

    Returns:
      The finished train and held-out stores.

    Raises:
      ValueError: no such site; a context longer than the subject's; stores of another spec there;
        NaN or infinite activations; max_bytes exceeded; a batch that shards cannot give.
      OSError: no space, or no permission to write.
    """
    subject = subject or load_subject(cfg.subject)
    subject.check_site(cfg.site)
    if cfg.context_length > subject.max_context:
        raise ValueError(
            f"Harvest.context_length = {cfg.context_length}: subject {subject.name!r} has "
            f"{subject.max_context} positions; give at most that."
        )
    texts = {split: _contexts(cfg, subject, split) for split in SPLITS}
    specs = {split: _spec(cfg, subject, split, texts[split]) for split in SPLITS}
    if batch_size is not None:
        check_batch_size(batch_size, specs["train"].contexts_per_shard)
    root = os.fspath(workdir).rstrip("/")
    stores = {split: open_store(f"{root}/{split}", specs[split], "w") for split in SPLITS}
    pending = {split: _pending(stores[split]) for split in SPLITS}
    _check_space(cfg, root, sum(specs[s].bytes_per_shard * len(pending[s]) for s in SPLITS), log)
    forward = _forward(subject, cfg)
    for split in SPLITS:
        store, contexts = stores[split], texts[split]
        store.write_documents(contexts.names)
        offset = len(pending[split]) * process_index // process_count
        order = pending[split][offset:] + pending[split][:offset]
        _fill(store, contexts, order, forward, log)
        store.finish(_provenance(cfg, subject, contexts, store.spec))
    return stores["train"], stores["held_out"]


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


def _contexts(cfg: HarvestConfig, subject: Subject, split: str) -> Contexts:
    documents = read_documents(cfg.text, split)
    try:
        return pack(documents, subject.tokenizer, cfg.context_length)
    except ValueError as error:
        raise ValueError(f"Text.source = {cfg.text.source!r}, {split} split: {error}") from error


def _spec(cfg: HarvestConfig, subject: Subject, split: str, contexts: Contexts) -> StoreSpec:
    goal = _goal(cfg, split, len(contexts.tokens))
    per_shard, n_shards = plan_shards(len(contexts.tokens), goal, cfg.contexts_per_shard)
    return StoreSpec(
        subject=subject.name,
        subject_fingerprint=subject.fingerprint,
        text_fingerprint=contexts.fingerprint,
        split=split,
        site=cfg.site,
        d_model=subject.width(cfg.site),
        context_length=cfg.context_length,
        first_position=FIRST_POSITION,
        contexts_per_shard=per_shard,
        n_shards=n_shards,
        compute_dtype=cfg.dtype,
        seed=cfg.seed,
    )


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
        "tokenizer_fingerprint": subject.tokenizer.fingerprint,
        "text": dataclasses.asdict(cfg.text),
        "text_bytes": contexts.bytes_total,
        "contexts_available": len(contexts.tokens),
        "contexts_wanted": goal,
        "contexts_dropped": max(0, goal - stored),  # they fill no shard
        "tokens_dropped_in_tails": contexts.dropped_tokens,
    }


def _pending(store: Store) -> list[int]:
    return sorted(set(range(store.spec.n_shards)) - set(store.committed()))


def _check_space(cfg: HarvestConfig, root: str, needed: int, log: Callable[[str], None]) -> None:
    if cfg.max_bytes is not None and needed > cfg.max_bytes:
        raise ValueError(
            f"Harvest.max_bytes = {cfg.max_bytes}: the activations need {needed} bytes. Raise it, "
            "or store fewer tokens."
        )
    free = check_free_space(root, needed)
    if needed:
        place = "" if free is None else f", {free / 1e9:.1f} GB free"
        log(f"harvest: {needed / 1e6:.1f} MB of activations to store at {root}{place}")


def _forward(subject: Subject, cfg: HarvestConfig) -> Callable[[np.ndarray], jax.Array]:
    """tokens [B, T] to bfloat16 activations [B, R, D] at the site."""
    params = jax.device_put(subject.params)
    dtype = jnp.dtype(cfg.dtype)

    @jax.jit
    def capture(params: Any, tokens_BT: jax.Array) -> jax.Array:
        acts_BTD = subject.capture(params, tokens_BT, (cfg.site,), dtype)[cfg.site]
        return acts_BTD[:, FIRST_POSITION:].astype(jnp.bfloat16)

    def forward(tokens_CT: np.ndarray) -> np.ndarray:
        n, size = len(tokens_CT), cfg.batch_contexts
        padded = np.zeros((-(-n // size) * size, tokens_CT.shape[1]), np.int32)
        padded[:n] = tokens_CT
        parts = [capture(params, padded[i : i + size]) for i in range(0, len(padded), size)]
        return np.concatenate([np.asarray(part) for part in parts])[:n]

    return forward


def _fill(
    store: Store,
    contexts: Contexts,
    shards: list[int],
    forward: Callable[[np.ndarray], np.ndarray],
    log: Callable[[str], None],
) -> None:
    """Produces the shards in order; while one is computed, the one before is being written."""
    spec = store.spec
    n = spec.contexts_per_shard
    order = permutation(len(contexts.tokens), spec.seed, CONTEXT_STREAM)
    began = logged = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as writer:
        writing: concurrent.futures.Future | None = None
        for done, shard in enumerate(shards):
            if shard in store.committed():  # by another process, since this one began
                continue
            ids = order[shard * n : (shard + 1) * n]
            tokens = contexts.tokens[ids]
            acts = forward(tokens)
            if writing is not None:
                writing.result()
            provenance = {"document": contexts.document[ids], "offset": contexts.offset[ids]}
            writing = writer.submit(
                store.write_shard, shard, acts, tokens=tokens, context=ids, **provenance
            )
            now = time.monotonic()
            if now - logged > _LOG_SECONDS or done + 1 == len(shards):
                log(_progress(store, done + 1, len(shards), now - began))
                logged = now
        if writing is not None:
            writing.result()


def _progress(store: Store, done: int, total: int, seconds: float) -> str:
    spec = store.spec
    tokens = done * spec.contexts_per_shard * spec.context_length
    left = seconds / done * (total - done)
    return (
        f"harvest {spec.split} {spec.site}: shard {done}/{total}, {tokens / seconds:,.0f} "
        f"tokens/s, {done * spec.bytes_per_shard / 1e6:.0f} MB, {left:.0f} s left"
    )
