"""The experiment: stages over one run directory, each from what the previous one left there.

harvest -> train -> evaluate -> report

Among several processes, all harvest and train; the first one keeps the directory, evaluates and
reports, while the others wait.
"""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from saejax import exits, plan, processes, watchdog
from saejax.capacity import TopKConfig
from saejax.checkpoint import CheckpointConfig
from saejax.data.loader import LoaderConfig
from saejax.data.storage import describe_store, describe_stream, plan_store
from saejax.data.synthetic import SyntheticConfig
from saejax.evals import recovery
from saejax.evals.metrics import LatentStatistics
from saejax.evals.rows import code_rows
from saejax.evals.suite import EvaluationConfig, evaluate, format_table
from saejax.fit import Fitted, fit
from saejax.mesh import MeshConfig, make_mesh
from saejax.model.sae import SAEConfig
from saejax.recipe import Recipe
from saejax.rundir import RunDirectory, write_json
from saejax.sources import Source, StoredConfig, check_width, open_source
from saejax.subjects.harvest import HarvestConfig
from saejax.subjects.streaming import StreamConfig
from saejax.train.guard import GuardConfig
from saejax.train.hooks import format_seconds
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import KernelConfig
from saejax.viewer import publish
from saejax.viewer.report import ReportConfig
from saejax.watchdog import WatchdogConfig
from saejax.wishes import StopSignal

_LOG = logging.getLogger(__name__)
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run: data, model, recipe, evaluation.

    Attributes:
      data: where activations come from: harvested, stored before, streamed, or synthetic.
      sae: the autoencoder.
      train: length and batching.
      loss, optimizer, topk, mesh, kernels, loader, checkpoint, guard, watchdog: see there.
      evaluation: held-out figures; None stops after training.
      report: the HTML page; None leaves it out.
    """

    data: HarvestConfig | StoredConfig | StreamConfig | SyntheticConfig
    sae: SAEConfig
    train: TrainConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    topk: TopKConfig = TopKConfig()
    mesh: MeshConfig = MeshConfig()
    kernels: KernelConfig = KernelConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    evaluation: EvaluationConfig | None = EvaluationConfig()
    report: ReportConfig | None = ReportConfig()

    def __post_init__(self):
        self.recipe()  # the parts must fit each other
        if isinstance(self.data, SyntheticConfig):
            check_width(self.sae, self.data.d_model, "Synthetic.d_model")
        if self.report is not None and self.evaluation is None:
            raise ValueError(
                "report needs evaluation: set Experiment.evaluation = @Evaluation(), or "
                "Experiment.report = None"
            )

    def recipe(self) -> Recipe:
        """What training reads."""
        return Recipe(
            sae=self.sae,
            train=self.train,
            loss=self.loss,
            optimizer=self.optimizer,
            topk=self.topk,
            mesh=self.mesh,
            kernels=self.kernels,
            checkpoint=self.checkpoint,
            guard=self.guard,
        )

    def plan(self, topology: str | None = None) -> str:
        """Memory, FLOPs, collectives and time, for `--dry_run`; see `plan.report`.

        Args:
          topology: hardware to plan for; None is what is present.
        """
        return "\n".join([plan.report(self.recipe(), topology), *self.plan_data()])

    def plan_data(self) -> list[str]:
        """The activations of this run in lines, stored or streamed; none of synthetic ones."""
        if isinstance(self.data, SyntheticConfig):
            return []
        width, buffered = self.sae.d_model, {}
        if isinstance(self.data, StoredConfig):
            stored = self.data.plan(self.train.tokens, width)
        else:
            streams = isinstance(self.data, StreamConfig)
            harvest = self.data.harvest if streams else self.data
            tokens = self.train.tokens if streams else harvest.tokens or self.train.tokens
            stored = plan_store(
                tokens,
                [width],
                harvest.context_length,
                contexts_per_shard=harvest.contexts_per_shard,
                first_position=harvest.first_position,
            )
            buffered = {"buffer_batches": self.data.buffer_batches} if streams else {}
        encoder = 2.0 * width * self.sae.n_latents
        streamed = describe_stream(self.train.batch_size, width, encoder, **buffered)
        return ["", *describe_store(stored), "", *streamed]

    def run(
        self,
        workdir: pathlib.Path,
        *,
        operative_gin: str,
        config_json: Mapping[str, Any],
        argv: Sequence[str],
        allow_config_change: bool = False,
    ) -> int:
        """Harvests and trains what is missing; evaluates and reports anew.

        Args:
          workdir: the run directory; a run of the same configuration in it is continued.
          operative_gin: the configuration as gin text, kept in the directory.
          config_json: the same as JSON; decides whether a run is the same.
          argv: the command line, kept in the directory.
          allow_config_change: continue a run of another configuration, and keep what changed.

        Returns:
          `exits.DONE`, or `exits.PREEMPTED` if a signal ended training early, after saving.

        Raises:
          ValueError, OSError: bad configuration or data; the message says what to do.
        """
        began = time.monotonic()
        run = RunDirectory(workdir)
        watchdog.configure(self.watchdog)
        with processes.losses_named():
            processes.join(config_json)
            code = self._stages(run, operative_gin, config_json, argv, allow_config_change)
            processes.part()
        if code == exits.DONE:
            _LOG.info("done in %s: %s", format_seconds(time.monotonic() - began), run.path)
        else:
            _LOG.info("stopped and saved; the same command continues")
        return code

    def _stages(
        self,
        run: RunDirectory,
        operative_gin: str,
        config_json: Mapping[str, Any],
        argv: Sequence[str],
        allow_change: bool,
    ) -> int:
        with run.change_accepted():
            self.claim(run, operative_gin, config_json, argv, allow_change)
            processes.meet("the run directory")  # nothing is compiled before all have seen it
            harvests = isinstance(self.data, HarvestConfig | StreamConfig)
            with watchdog.phase("harvest" if harvests else "start"):
                mesh = make_mesh(plan.resolve_mesh(self.recipe(), jax.devices()))
                source = open_source(
                    self.data, self.sae, self.loader, self.train.batch_size, run.activations, mesh
                )
            config = {"json": config_json, "gin": operative_gin}
            with StopSignal().listening() as stop_requested:
                fitted = self.fit(run, source, source.batches, stop_requested, config, allow_change)
        watchdog.enter("start")
        if fitted.stopped:
            return exits.PREEMPTED
        self.measure(run, source, fitted, operative_gin)
        return exits.DONE

    def claim(
        self,
        run: RunDirectory,
        operative_gin: str,
        config_json: Mapping[str, Any],
        argv: Sequence[str],
        allow_change: bool,
    ) -> None:
        """Makes the run directory this run's own, for all processes; see `RunDirectory.claim`."""

        def lead() -> str:
            # Too few devices: found before the harvest, not after it.
            token = run.claim(config_json, operative_gin, argv, allow_change=allow_change)
            make_mesh(plan.resolve_mesh(self.recipe(), jax.devices()))
            return token

        token = processes.lead("claim of the run directory", lead)
        run.require_claim(token, f"process {processes.index()} of {processes.count()}")

    def fit(
        self,
        run: RunDirectory,
        source: Source,
        batches: Any,
        stop_requested: Callable[[], bool],
        config: Mapping[str, Any],
        allow_change: bool,
    ) -> Fitted:
        """Trains on `batches`, which are those of the source or another way to them."""
        return fit(
            self.recipe(),
            batches,
            identity=source.identity,
            checkpoints=run.checkpoints,
            write_to=run.path,
            stop_requested=stop_requested,
            config=config,
            allow_config_change=allow_change,
        )

    def measure(
        self, run: RunDirectory, source: Source, fitted: Fitted, operative_gin: str
    ) -> None:
        """Evaluates and reports, in one process while the others wait, if that is configured."""
        if self.evaluation is not None:
            with watchdog.phase("evaluation"):
                processes.lead(
                    "evaluation", lambda: self._measure(source, fitted, run, operative_gin)
                )

    def _measure(
        self, source: Source, fitted: Fitted, run: RunDirectory, operative_gin: str
    ) -> None:
        statistics = self._evaluate(source, fitted, run)
        if self.report is not None:
            self._report(source, fitted, run, statistics, operative_gin)

    def _evaluate(self, source: Source, fitted: Fitted, run: RunDirectory) -> LatentStatistics:
        extra: dict[str, Any] = {"dead_fraction_train": fitted.dead_fraction}
        if source.synthetic is not None:
            extra["recovery"] = recovery_scores(source, fitted)
        wanted = source.inputs is not None and self.evaluation.downstream_tokens != 0
        result, statistics = evaluate(
            fitted.sae,
            source.held_out,
            self.evaluation,
            train_rows=source.train_rows,
            untrained=fitted.untrained(),
            inputs=source.inputs() if wanted else None,  # which loads the subject
            extra=extra,
        )
        write_json(run.evaluation, result)
        for line in format_table(result).split("\n"):
            _LOG.info("%s", line)
        return statistics

    def _report(
        self,
        source: Source,
        fitted: Fitted,
        run: RunDirectory,
        statistics: LatentStatistics,
        operative_gin: str,
    ) -> None:
        publish.publish(
            self.report,
            fitted.sae,
            evaluation=json.loads(run.evaluation.read_text()),
            metrics=run.metrics,
            statistics=statistics,
            contexts=source.contexts,
            documents=source.documents,
            subject=source.subject() if source.subject and self.report.latents else None,
            site=source.site,
            operative=operative_gin,
            page=run.report,
            folder=run.figures,
        )
        _LOG.info("report: %s", run.report)


def recovery_scores(source: Source, fitted: Fitted) -> dict[str, float]:
    """How well the dictionary recovers the true features of synthetic data, on held-out rows."""
    truth, weights = source.synthetic, np.asarray(fitted.sae.w_dec[...])
    rows, magnitudes = truth.held_out()
    codes = list(code_rows(fitted.sae, [rows], batch_size=_ROWS_AT_ONCE))
    values, indices = (
        np.concatenate([getattr(code, name) for code in codes]) for name in ("values", "indices")
    )
    _, match = recovery.match(truth.features, weights)
    f1 = recovery.f1_of_matches(magnitudes, values, indices, match, len(weights))
    scores = recovery.recovery(truth.features, truth.probabilities, weights)
    return scores | recovery.f1_scores(f1, truth.probabilities)
