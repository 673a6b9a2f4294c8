"""The harvest as a run of its own: text to activation stores, by any number of processes."""

import dataclasses
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from saejax import exits, processes, watchdog
from saejax.data.corpus import TextConfig
from saejax.data.shards import Store
from saejax.data.storage import describe_store, describe_stream, duration, plan_of, plan_store
from saejax.data.store_place import check_place
from saejax.rundir import RunDirectory
from saejax.subjects.harvest import (
    SPLITS,
    check_asked,
    check_quota,
    harvest,
    read_contexts,
    store_specs,
)
from saejax.subjects.hf import describe_subject
from saejax.subjects.request import HarvestConfig, resolve_request
from saejax.watchdog import WatchdogConfig

_LOG = logging.getLogger(__name__)
_BATCH = 131_072  # the paper's, for the size of the streaming alternative


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarvestRun:
    """A harvest alone; any number of processes may run it in one folder at once.

    Attributes:
      data: what is harvested.
      path: folder (or gs://, s3:// URL) for the stores; None for `activations` in the run
        directory. `Stored.path` of a training run names it.
      width: width of the site; with `Harvest.tokens` it lets --dry_run plan the store without
        loading subject or text. Nothing else reads it.
      tokens_per_second: what the subject has been measured to read, all processes together, for
        the time that --dry_run prints.
      watchdog: deadlines.
    """

    data: HarvestConfig
    path: str | None = None
    width: int | None = None
    tokens_per_second: float | None = None
    watchdog: WatchdogConfig = WatchdogConfig()

    def __post_init__(self):
        for name in ("width", "tokens_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"HarvestRun.{name} = {value}: must be above 0, or None.")
        if self.width is not None and self.data.tokens is None:
            raise ValueError(
                f"HarvestRun.width = {self.width} plans without the text, so Harvest.tokens must "
                "say how much is stored."
            )

    def plan(self, topology: str | None = None) -> str:
        """The stores, in rows, bytes, files and time, for `--dry_run`.

        Args:
          topology: must be None: a harvest runs on what is present.

        Raises:
          ValueError: a topology; more bytes than `Harvest.max_bytes`.
        """
        if topology is not None:
            raise ValueError(f"--topology={topology} plans training; leave it out for a harvest.")
        self._check_path()
        cfg, plans = self.data, []
        if self.width is not None:
            widths = [self.width] * len(cfg.all_sites)
            size = {
                "contexts_per_shard": cfg.contexts_per_shard,
                "first_position": cfg.first_position,
            }
            plans = [plan_store(cfg.tokens, widths, cfg.context_length, **size)]
        else:
            ids_only = not isinstance(cfg.text, TextConfig)
            subject = describe_subject(cfg.subject, dtype=cfg.dtype, ids_only=ids_only)
            cfg, subject = resolve_request(cfg, subject)
            check_asked(cfg, subject)
            for split in SPLITS:
                contexts = read_contexts(cfg, subject, split, watchdog.beating(_LOG.info))
                plans.append(plan_of(list(store_specs(cfg, subject, split, contexts).values())))
        needed = sum(plan.activation_bytes + plan.table_bytes for plan in plans)
        lines = []
        for split, plan in zip(SPLITS, plans):
            lines += [f"{split}: " + describe_store(plan, self.tokens_per_second)[0]]
            lines += [*describe_store(plan, self.tokens_per_second)[1:], ""]
        lines += describe_stream(_BATCH, max(plans[0].widths))
        check_quota(cfg, needed)
        return "\n".join(lines)

    def run(
        self,
        workdir: pathlib.Path,
        *,
        operative_gin: str,
        config_json: Mapping[str, Any],
        argv: Sequence[str],
        allow_config_change: bool = False,
    ) -> int:
        """Produces the shards that are missing; the same command, once more or at once, helps.

        Args:
          workdir: the run directory; a harvest of the same configuration in it is continued.
          operative_gin: the configuration as gin text, kept in the directory.
          config_json: the same as JSON; decides whether a harvest is the same.
          argv: the command line, kept in the directory.
          allow_config_change: the folder may hold a run of another configuration; a store that is
            not of this one is refused nevertheless.

        Returns:
          `exits.DONE`.

        Raises:
          ValueError, OSError: bad configuration or data; the message says what to do.
        """
        self._check_path()
        began = time.monotonic()
        run = RunDirectory(workdir)
        root = self.path or str(run.activations)
        watchdog.configure(self.watchdog)
        with processes.losses_named(), watchdog.phase("harvest"):
            processes.join(config_json)
            processes.lead(
                "claim of the run directory",
                lambda: run.claim(
                    config_json, operative_gin, argv, allow_change=allow_config_change
                ),
            )
            stores = harvest(
                self.data,
                root,
                watchdog.beating(_LOG.info),
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            processes.part()
        for pair in stores.values():
            _report(pair)
        _LOG.info("harvested in %s: %s", duration(time.monotonic() - began), root)
        return exits.DONE

    def _check_path(self) -> None:
        if self.path is not None:
            check_place(self.path, "HarvestRun.path")


def _report(stores: Sequence[Store]) -> None:
    for store in stores:
        rows = f"{store.n_rows:,} activations of width {store.spec.d_model}"
        _LOG.info("%s: %s in %d shards", store.path, rows, store.spec.n_shards)
