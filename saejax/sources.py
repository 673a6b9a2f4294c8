"""From a data configuration to everything the stages of a run read from it."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from saejax import watchdog
from saejax.data.layout import CONTEXT_COLUMNS
from saejax.data.loader import Loader, LoaderConfig
from saejax.data.shards import NoStoreError, Store, open_store
from saejax.data.storage import StorePlan, plan_of, plan_store
from saejax.data.synthetic import Synthetic, SyntheticConfig
from saejax.evals.downstream import DownstreamInputs
from saejax.latents.summaries import ContextBlock
from saejax.mesh import subject_mesh
from saejax.model.sae import SAEConfig
from saejax.subjects.base import Subject
from saejax.subjects.filling import own_mesh
from saejax.subjects.harvest import HarvestConfig, harvest
from saejax.subjects.hf import TORCH, load_subject
from saejax.subjects.request import open_subject, resolve_request
from saejax.subjects.streaming import SiteBatches, StreamConfig, open_stream
from saejax.subjects.weights import DTYPES

_LOG = logging.getLogger(__name__)

_BLOCK_ROWS = 8192
_SAMPLE_ROWS = 65_536  # of a stream, for its mean and the PCA baseline


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredConfig:
    """Activation stores made before, by this or another run.

    Attributes:
      path: folder (or gs://, s3:// URL) that holds the stores 'train' and 'held_out'.
      subject: the subject model they come from, for the loss with the reconstruction put back;
        None leaves that part of the evaluation out.
      subject_shards: devices that share its weights, in the precision that they were harvested in;
        1 for a 'torch:' one.
    """

    path: str
    subject: str | None = None
    subject_shards: int = 1

    def __post_init__(self) -> None:
        if self.subject_shards < 1:
            raise ValueError(f"Stored.subject_shards = {self.subject_shards}: must be at least 1.")
        if self.subject_shards > 1 and (self.subject or "").startswith(TORCH):
            raise ValueError(
                f"Stored.subject_shards = {self.subject_shards}: subject {self.subject!r} runs "
                "outside JAX and is not split over devices; set it to 1."
            )

    def plan(self, tokens: int, width: int) -> StorePlan:
        """The size of the training split; of one of so many tokens where none can be seen: it is
        not there yet, or not on this machine."""
        if "://" not in self.path:  # a plan asks no network
            try:
                return plan_of([open_store(f"{self.path.rstrip('/')}/train").spec])
            except NoStoreError:
                pass
        return plan_store(tokens, [width], 64)


DataConfig = HarvestConfig | StoredConfig | StreamConfig | SyntheticConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What the stages read.

    Attributes:
      batches: training batches: `iterate(start_step, ranges=...)`, `sample_rows(n)`, `d_model`,
        `tokens_per_epoch`.
      held_out: starts a pass over blocks of raw held-out activations `[..., D]`.
      train_rows: starts a pass over training activations, or a sample of them, for the PCA
        baseline.
      identity: fingerprints of the data; a resumed run must find the same.
      contexts: starts a pass over held-out contexts with their activations; None if there is no
        text behind the data.
      documents: names of the held-out documents.
      subject: gives the subject model, for the evaluation, with one copy of the weights on devices
        of this process alone; None without one. Weights that are not there are read again.
      site: where it was tapped, or None.
      inputs: makes the inputs of the downstream evaluation; None without a subject, or with one
        that has no logits here (`torch_adapter.TorchSubject`).
      synthetic: the generator with its ground truth, or None.
    """

    batches: Any
    held_out: Callable[[], Iterator[np.ndarray]]
    train_rows: Callable[[], Iterator[np.ndarray]]
    identity: dict[str, str]
    contexts: Callable[[], Iterator[ContextBlock]] | None = None
    documents: tuple[str, ...] = ()
    subject: Callable[[], Subject] | None = None
    site: str | None = None
    inputs: Callable[[], DownstreamInputs] | None = None
    synthetic: Synthetic | None = None


def open_source(
    config: DataConfig,
    sae: SAEConfig,
    loader: LoaderConfig,
    batch_size: int,
    activations: pathlib.Path,
    mesh: Mesh,
) -> Source:
    """Opens the data of a run; harvests first what is not stored yet.

    Args:
      config: where activations come from.
      sae: for the width they must have.
      loader: how stored activations are drawn.
      batch_size: tokens per step.
      activations: where a harvest stores them.
      mesh: of the training; streamed activations are made on it.

    Raises:
      ValueError: the activations have another width than SAE.d_model, or do not fit the batch.
    """
    if isinstance(config, SyntheticConfig):
        check_width(sae, config.d_model, "Synthetic.d_model")
        return _synthetic_source(config, batch_size)
    if isinstance(config, StreamConfig):
        site = config.harvest.site
        return open_streams(config, {site: sae}, batch_size, activations, mesh)[site]
    if isinstance(config, StoredConfig):
        root = config.path.rstrip("/")
        train, held_out = (open_store(f"{root}/{split}") for split in ("train", "held_out"))
        subject = None if config.subject is None else _subject_of(train, config)
    else:
        subject = open_subject(config, on_devices=True)
        subject.check_site(config.site)
        check_width(sae, subject.width(config.site), f"site {config.site} of {subject.name}")
        train, held_out = harvest(
            config,
            os.fspath(activations),
            subject=subject,
            batch_size=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            log=watchdog.beating(_LOG.info),
        )[config.site]
        if isinstance(subject, Subject):
            subject = subject.without_weights()  # the devices are the training's until it ends
    for store in (train, held_out):
        check_width(sae, store.spec.d_model, f"the store at {store.path}")
    _check_same_origin(train, held_out)
    return _stored_source(train, held_out, subject, config.subject_shards, loader, batch_size)


def _subject_of(store: Store, config: StoredConfig) -> Subject:
    """The subject of a store, as `subjects.request.open_subject` loaded it for the harvest.

    It has no weights yet: they were loaded to be compared with the store's fingerprint, which tells
    in which precision they were held, too.

    Raises:
      ValueError: the weights are others in either.
    """
    spec, name, found = store.spec, config.subject, []
    options: dict[str, Any] = {"ids_only": True}  # the tokens are in the store
    dtypes: list[str] = [spec.compute_dtype]
    if not name.startswith(TORCH):
        said = store.manifest["provenance"].get("weights_dtype")
        dtypes = sorted(DTYPES, key=lambda dtype: dtype != said)
        options["mesh"] = own_mesh(config.subject_shards, 1)
    for dtype in dtypes:
        subject = load_subject(name, dtype=dtype, **options)
        if isinstance(subject, Subject):
            subject = subject.without_weights()
        if subject.fingerprint == spec.subject_fingerprint:
            return subject
        found.append(f"{subject.fingerprint} in {dtype}")
    raise ValueError(
        f"the store at {store.path} was made with subject {spec.subject!r} of fingerprint "
        f"{spec.subject_fingerprint}, but the given subject {subject.name!r} has "
        f"{' and '.join(found)}; give the same weights"
    )


def check_width(sae: SAEConfig, width: int, what: str) -> None:
    """Raises ValueError unless the model reads activations of this width."""
    if sae.d_model != width:
        raise ValueError(
            f"SAE.d_model = {sae.d_model} does not fit {what}, which is {width} wide; set "
            f"SAE.d_model = {width}"
        )


def _check_same_origin(train: Store, held_out: Store) -> None:
    for field in ("subject_fingerprint", "site", "context_length", "first_position"):
        ours, theirs = getattr(train.spec, field), getattr(held_out.spec, field)
        if ours != theirs:
            raise ValueError(
                f"{field} = {ours!r} in the store at {train.path}, but {theirs!r} in the one at "
                f"{held_out.path}; give two splits of one harvest"
            )


def _synthetic_source(config: SyntheticConfig, batch_size: int) -> Source:
    batches = Synthetic(config, batch_size)

    def held_out():
        rows = batches.held_out()[0]
        for start in range(0, len(rows), _BLOCK_ROWS):
            yield rows[start : start + _BLOCK_ROWS]

    return Source(
        batches=batches,
        held_out=held_out,
        train_rows=batches.iterate,
        identity={"synthetic": repr(config)},
        synthetic=batches,
    )


def _stored_source(
    train: Store,
    held_out: Store,
    subject: Subject | None,
    shards: int,
    loader: LoaderConfig,
    batch_size: int,
) -> Source:
    return _text_source(
        held_out,
        subject,
        None if subject is None else _on_own_devices(subject, shards),
        batches=Loader(train, batch_size, loader),
        train_rows=lambda: (chunk for chunk, _, _ in train.rows()),
        mean_D=np.asarray(train.manifest["mean"]),
        identity={"train": train.manifest["sha256"]},
    )


def open_streams(
    config: StreamConfig,
    saes: Mapping[str, SAEConfig],
    batch_size: int,
    activations: pathlib.Path,
    mesh: Mesh,
) -> dict[str, Source]:
    """Opens the sites of one stream, which share its forward passes; by site.

    Args:
      config: the stream.
      saes: for the width of each site.
      batch_size: tokens per step.
      activations: where the held-out activations are stored.
      mesh: of the training.

    Raises:
      ValueError: see `open_source`; or two names of one site.
    """
    sites = tuple(saes)
    held_out = dataclasses.replace(config.held_out, site=sites[0], sites=sites[1:])
    subject = open_subject(held_out, mesh=subject_mesh(mesh, held_out.subject_shards))
    for site, sae in saes.items():
        check_width(sae, subject.width(site), f"site {site} of {subject.name}")
    held_out, subject = resolve_request(held_out, subject)
    log = watchdog.beating(_LOG.info)
    stored = harvest(
        held_out,
        os.fspath(activations),
        subject=subject,
        splits=("held_out",),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        log=log,
    )
    stream, identity = open_stream(config, subject, held_out.all_sites, batch_size, mesh, log)
    sources, loaded = {}, _on_own_devices(subject, held_out.subject_shards)
    for asked, site in zip(sites, held_out.all_sites, strict=True):
        batches = SiteBatches(stream, site, subject.width(site))
        # Now, while all processes are here: evaluation is the work of one.
        rows = batches.sample_rows(min(_SAMPLE_ROWS, stream.tokens_per_epoch))
        sources[asked] = _text_source(
            stored[site][0],
            subject,
            loaded,
            batches=batches,
            train_rows=lambda rows=rows: iter([rows]),
            mean_D=rows.mean(0, dtype=np.float64),
            identity=identity,
        )
    return sources


def _on_own_devices(subject: Subject, shards: int) -> Callable[[], Subject]:
    """Gives the subject for the evaluation, the work of one process, which takes one copy.

    Nothing is placed before it is called, and then once.
    """
    if not isinstance(subject, Subject):
        return lambda: subject
    return functools.cache(lambda: subject.place(own_mesh(shards, 1)))


def _text_source(
    held_out: Store,
    subject: Subject | None,
    loaded: Callable[[], Subject] | None,
    *,
    batches: Any,
    train_rows: Callable[[], Iterator[np.ndarray]],
    mean_D: np.ndarray,
    identity: dict[str, str],
) -> Source:
    """A source whose held-out activations are stored, with the text behind them.

    `subject` need have no weights; `loaded` gives it with them.
    """
    spec = held_out.spec
    site = spec.site if subject is None else subject.resolve_site(spec.site)
    runs_here = isinstance(subject, Subject)
    if subject is not None and not runs_here:
        _LOG.info(
            "subject %s runs outside JAX: the evaluation leaves out the downstream loss and the "
            "report the effects on logits",
            subject.name,
        )

    def inputs() -> DownstreamInputs:
        return DownstreamInputs(
            subject=loaded(),
            contexts=tokens_of(held_out),
            site=site,
            mean=mean_D,
            first_position=spec.first_position,
        )

    return Source(
        batches=batches,
        held_out=lambda: (block.stored_rows() for block in contexts_of(held_out)),
        train_rows=train_rows,
        identity=identity | {"held_out": held_out.manifest["sha256"]},
        contexts=lambda: contexts_of(held_out),
        documents=held_out.documents,
        subject=loaded,
        site=site,
        inputs=inputs if runs_here else None,
    )


def contexts_of(store: Store) -> Iterator[ContextBlock]:
    """All contexts of a store with their activations, a shard at a time."""
    for shard in store.committed():
        rows = store.read_shard_rows(shard)
        yield ContextBlock(
            rows=rows.rows,
            tokens=rows.tokens,
            document=rows.document,
            offset=rows.offset,
            ids=rows.context.astype(np.int64),
            stored=rows.stored,
        )


def tokens_of(store: Store) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All contexts of a store without their activations: tokens and mask `[C, T]`, by shard."""
    for shard in store.committed():
        yield store.read_contexts(shard)[:, CONTEXT_COLUMNS:], store.read_mask(shard)
