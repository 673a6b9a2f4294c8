"""Activations of a subject model as a stream: what `data.stream` needs, from a configuration."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax.data.feed import Provenance, Ranges
from saejax.data.stream import Stream, usable_positions
from saejax.data.stream_plan import StreamPlan, contexts_for, lanes_for
from saejax.subjects.base import Subject
from saejax.subjects.harvest import HarvestConfig, read_contexts
from saejax.subjects.hf import TORCH

_LOG = logging.getLogger(__name__)
_HELD_OUT_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Activations computed while training, never stored.

    Attributes:
      harvest: subject, sites and text; its held-out activations are stored, the training ones are
        not. `Harvest.tokens` bounds the rows of an epoch, whose contexts are drawn from all of the
        text; `Harvest.held_out_tokens` is 1,000,000 where it is None. `Harvest.batch_contexts` is
        the number of contexts of a lane in one forward pass.
      lanes: parts of every batch with contexts and a buffer of their own; the sequence of batches
        depends on it, not on the devices, whose number must divide it. None: the least common
        multiple of 8 and the devices, or one a device where the batch does not divide by that. A
        device passes the contexts of all its lanes at once.
      buffer_batches: batches that the swap buffers hold together. Batches of 16 buffered ones and
        more were as good as an exact shuffle in our measurements.
    """

    harvest: HarvestConfig
    lanes: int | None = None
    buffer_batches: int = 64

    def __post_init__(self) -> None:
        for name in ("lanes", "buffer_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Stream.{name} = {value}: must be at least 1.")
        if self.harvest.sites:
            raise ValueError(
                f"Harvest.sites = {self.harvest.sites}: a stream is read at Harvest.site, or at "
                "the sites of the members of Several; leave Harvest.sites empty."
            )
        if self.harvest.subject.startswith(TORCH):
            raise _on_the_host(self.harvest.subject)

    @property
    def held_out(self) -> HarvestConfig:
        """The harvest of the held-out split."""
        tokens = self.harvest.held_out_tokens or _HELD_OUT_TOKENS
        return dataclasses.replace(self.harvest, held_out_tokens=tokens)


class SiteBatches:
    """The batches of one site of a stream, as training reads them.

    Attributes:
      stream: the stream.
      site: the site.
      d_model: its width.
      batch_size, tokens_per_epoch: see `Stream`.
    """

    def __init__(self, stream: Stream, site: str, d_model: int):
        """Reads a site that the stream captures."""
        self.stream, self.site, self.d_model = stream, site, d_model
        self.batch_size, self.tokens_per_epoch = stream.batch_size, stream.tokens_per_epoch

    def next(self, state: int, ranges: Ranges | None = None) -> tuple[jax.Array, Provenance, int]:
        """The batch of a state, where its rows are from, and the state after it.

        `Loader.next` is the same of a store. Every process of the mesh must call it alike; the
        sites of a stream share its forward passes if they are asked for the same state in turn.

        Args:
          state: 0, or what an earlier call returned, in whatever process: a number. See
            `Stream.at` for what a jump costs.
          ranges: of no matter, because the rows are where they belong already.

        Returns:
          rows bfloat16 `[B, D]` on the devices, provenance of all, and the next state.
        """
        del ranges
        rows_BD, rows = self.stream.at(state)[self.site]
        return rows_BD, self.stream.provenance(rows), state + 1

    def iterate(self, start_step: int = 0, ranges: Ranges | None = None) -> Iterator[jax.Array]:
        """Batches `[B, D]` on the devices, from `start_step` on, without end."""
        del ranges  # they are where they belong already
        return (batch[self.site][0] for batch in self.stream.iterate(start_step))

    def sample_rows(self, n: int) -> np.ndarray:
        """See `Stream.sample_rows`."""
        return self.stream.sample_rows(n, self.site)


def open_stream(
    cfg: StreamConfig,
    subject: Subject,
    sites: Sequence[str],
    batch_size: int,
    mesh: Mesh,
    log: Callable[[str], None] = _LOG.info,
) -> tuple[Stream, dict[str, str]]:
    """A stream of training activations, and the fingerprints of what it reads.

    Args:
      cfg: the configuration.
      subject: the loaded model.
      sites: to capture.
      batch_size: rows of a batch.
      mesh: of the training.
      log: takes a line every few seconds while text is read, and what came of it.

    Raises:
      ValueError: no such site; a context longer than the subject's; too little text; a batch or
        lanes that do not divide by the devices; a subject that runs on the host.
    """
    harvest = cfg.harvest
    if not isinstance(subject, Subject):
        raise _on_the_host(harvest.subject)
    for site in sites:
        subject.check_site(site)
    contexts = read_contexts(harvest, subject, "train", log)
    keep = usable_positions(contexts, harvest.first_position)
    plan = _plan(cfg, keep, batch_size, mesh)
    log(
        f"stream: {int(plan.kept.sum()):,} of {keep.size:,} positions may be used (others: first, "
        f"special, padding); {plan.rows_per_epoch:,} rows an epoch, those left over in another"
    )
    own_mesh = mesh_lib.subject_mesh(mesh, harvest.subject_shards)
    rows, dtype = mesh_lib.subject_batch_sharding(own_mesh), jnp.dtype(harvest.dtype)

    def forward(params: Any, tokens_NT: jax.Array) -> dict[str, jax.Array]:
        tokens_NT = jax.lax.with_sharding_constraint(tokens_NT, rows)
        return subject.capture(params, tokens_NT, sites, dtype)

    stream = Stream(
        forward,
        subject.place(own_mesh).params,
        contexts,
        plan,
        mesh,
        keep=keep,
        max_norm_ratio=harvest.max_norm_ratio,
    )
    described = _described(plan, harvest)
    identity = {
        "subject": subject.fingerprint, "text": contexts.fingerprint, "stream": described
    }  # fmt: skip
    return stream, identity


def _on_the_host(subject: str) -> ValueError:
    return ValueError(
        f"Harvest.subject = {subject!r} runs on the host, and cannot be streamed on the mesh; "
        "store its activations: Experiment.data = @Harvest()."
    )


def _plan(cfg: StreamConfig, keep: np.ndarray, batch_size: int, mesh: Mesh) -> StreamPlan:
    harvest, kept = cfg.harvest, keep.sum(1)
    return StreamPlan(
        n_contexts=contexts_for(kept, harvest.tokens, harvest.seed),
        kept=kept,
        lanes=lanes_for(mesh.size, batch_size, cfg.lanes),
        group_contexts=harvest.batch_contexts,
        batch_size=batch_size,
        buffer_batches=cfg.buffer_batches,
        seed=harvest.seed,
    )


def _described(plan: StreamPlan, harvest: HarvestConfig) -> str:
    """What the sequence of batches depends on, beside subject and text."""
    contexts, available = plan.n_contexts, len(plan.kept)
    settings = {
        "Stream.lanes": plan.lanes,
        "Stream.buffer_batches": plan.buffer_batches,
        "Harvest.batch_contexts": plan.group_contexts,
        "Harvest.first_position": harvest.first_position,
        "Harvest.max_norm_ratio": harvest.max_norm_ratio,
        "Harvest.dtype": harvest.dtype,
        "Harvest.seed": plan.seed,
        "contexts": contexts if contexts == available else f"{contexts} drawn of {available}",
    }
    return ", ".join(f"{name} = {value}" for name, value in settings.items())
