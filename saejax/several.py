"""Several autoencoders at once, fed by one stream: other sites, sizes, sparsities, one subject.

The forward passes of the subject are made once for all of them. Each has a run directory of its
own, `<workdir>/<name>`, and is what a run of its own would have made of the same batches.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from saejax import exits, plan, processes, watchdog
from saejax.capacity import TopKConfig
from saejax.checkpoint import CheckpointConfig
from saejax.evals.suite import EvaluationConfig
from saejax.lockstep import together
from saejax.mesh import MeshConfig, make_mesh, shape_of
from saejax.model.sae import SAEConfig
from saejax.run import Experiment
from saejax.rundir import RunDirectory
from saejax.sources import Source, open_streams
from saejax.subjects.streaming import StreamConfig
from saejax.train.guard import GuardConfig
from saejax.train.hooks import format_seconds
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import KernelConfig
from saejax.viewer.report import ReportConfig
from saejax.watchdog import WatchdogConfig
from saejax.wishes import StopSignal

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_TAKEN = ("activations", "checkpoints", "figures", "tensorboard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One of several autoencoders.

    Attributes:
      name: of its run directory, below that of the run.
      site: where the subject is tapped; None for `Harvest.site`.
      sae, loss, optimizer, topk: see there.
    """

    name: str
    sae: SAEConfig
    site: str | None = None
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    topk: TopKConfig = TopKConfig()

    def __post_init__(self):
        if not _NAME.fullmatch(self.name) or self.name in _TAKEN:
            raise ValueError(
                f"Member.name = {self.name!r} names a folder: letters, digits, '.', '_' and '-', "
                f"and none of {', '.join(_TAKEN)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several:
    """A run of several autoencoders on one stream.

    Attributes:
      data: the stream; its sites are those of the members.
      members: the autoencoders; names differ.
      train: length and batching, of all.
      mesh, kernels, checkpoint, guard, watchdog: of all. With `mesh_shape = 'auto'` all take the
        shape that suits the first member.
      evaluation, report: of each; None leaves it out.
    """

    data: StreamConfig
    members: tuple[Member, ...]
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    kernels: KernelConfig = KernelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    evaluation: EvaluationConfig | None = EvaluationConfig()
    report: ReportConfig | None = ReportConfig()

    def __post_init__(self):
        if not self.members:
            raise ValueError("Several.members is empty: give at least one @Member()")
        names = Counter(member.name for member in self.members)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"Several.members: two are named {twice[0]!r}; give each its own name")
        self.experiments(self.mesh)  # the parts must fit each other

    def experiments(self, mesh: MeshConfig) -> dict[str, Experiment]:
        """Each member as a run of its own, by name."""
        shared = {
            name: getattr(self, name)
            for name in ("train", "kernels", "checkpoint", "guard", "watchdog")
        }
        shared |= {"evaluation": self.evaluation, "report": self.report, "mesh": mesh}
        found = {}
        for member in self.members:
            harvest = dataclasses.replace(self.data.harvest, site=self.site_of(member), sites=())
            found[member.name] = Experiment(
                data=dataclasses.replace(self.data, harvest=harvest),
                sae=member.sae,
                loss=member.loss,
                optimizer=member.optimizer,
                topk=member.topk,
                **shared,
            )
        return found

    def site_of(self, member: Member) -> str:
        """The site that a member reads."""
        return member.site or self.data.harvest.site

    def plan(self, topology: str | None = None) -> str:
        """The plan of every member, then of each site's activations; for `--dry_run`."""
        each = self._each()
        parts = [f"{name}:\n{plan.report(one.recipe(), topology)}" for name, one in each.items()]
        of_site = {self.site_of(member): each[member.name] for member in self.members}
        parts += ["\n".join([f"site {site}:", *one.plan_data()]) for site, one in of_site.items()]
        return "\n\n".join(parts)

    def _each(self) -> dict[str, Experiment]:
        return self.experiments(self.mesh)

    def run(
        self,
        workdir: pathlib.Path,
        *,
        operative_gin: str,
        config_json: Mapping[str, Any],
        argv: Sequence[str],
        allow_config_change: bool = False,
    ) -> int:
        """Trains all members side by side, then evaluates and reports each.

        Args:
          workdir: the run directory; a run of the same configuration in it is continued.
          operative_gin, config_json, argv, allow_config_change: see `Experiment.run`.

        Returns:
          `exits.DONE`, or `exits.PREEMPTED` if a signal ended training early.

        Raises:
          ValueError, OSError: bad configuration or data; the message says what to do.
        """
        began = time.monotonic()
        watchdog.configure(self.watchdog)
        about = (operative_gin, config_json, argv, allow_config_change)
        with processes.losses_named():
            processes.join(config_json)
            code = self._stages(pathlib.Path(workdir), *about)
            processes.part()
        if code == exits.DONE:
            _LOG.info("done in %s: %s", format_seconds(time.monotonic() - began), workdir)
        else:
            _LOG.info("stopped and saved; the same command continues")
        return code

    def _stages(self, workdir: pathlib.Path, gin: str, as_json, argv, allow_change: bool) -> int:
        first = next(iter(self._each().values()))
        mesh = make_mesh(plan.resolve_mesh(first.recipe(), jax.devices()))
        shape = tuple(shape_of(mesh))
        experiments = self.experiments(dataclasses.replace(self.mesh, mesh_shape=shape))
        runs = {name: RunDirectory(workdir / name) for name in experiments}
        with contextlib.ExitStack() as stack:
            for run in runs.values():  # a change that one refuses is none for any
                stack.enter_context(run.change_accepted())
            for name, experiment in experiments.items():
                experiment.claim(runs[name], gin, as_json, argv, allow_change)
            processes.meet("the run directories")  # nothing is compiled before all have seen them
            with watchdog.phase("harvest"):
                sources = self._sources(workdir / "activations", mesh)
            stop_requested = stack.enter_context(StopSignal().listening())
            config = {"json": as_json, "gin": gin}
            trainings = {
                name: (
                    sources[name].batches,
                    functools.partial(
                        _train, experiment, runs[name], sources[name], stop_requested, config,
                        allow_change,
                    ),
                )
                for name, experiment in experiments.items()
            }  # fmt: skip
            fitted = together(trainings, functools.partial(_batches, sources))
        watchdog.enter("start")  # not before all of them have saved
        if any(one.stopped for one in fitted.values()):
            return exits.PREEMPTED
        for name, experiment in experiments.items():
            _LOG.info("%s:", name)
            experiment.measure(runs[name], sources[name], fitted[name], gin)
        return exits.DONE

    def _sources(self, activations: pathlib.Path, mesh: Mesh) -> dict[str, Source]:
        """Each member's source, all of one stream."""
        saes = {self.site_of(member): member.sae for member in self.members}
        for member in self.members:
            width = saes[self.site_of(member)].d_model
            if member.sae.d_model != width:
                raise ValueError(
                    f"SAE.d_model = {member.sae.d_model} of member {member.name!r}, but {width} of "
                    f"another one at site {self.site_of(member)!r}; a site has one width"
                )
        by_site = open_streams(self.data, saes, self.train.batch_size, activations, mesh)
        return {member.name: by_site[self.site_of(member)] for member in self.members}


def _train(experiment, run, source, stop_requested, config, allow_change, batches):
    """`Experiment.fit` on the shared batches."""
    return experiment.fit(run, source, batches, stop_requested, config, allow_change)


def _batches(sources: Mapping[str, Source], start_step: int) -> Iterator[dict[str, jax.Array]]:
    """Batches by member, from one stream."""
    stream = next(iter(sources.values())).batches.stream
    for batch in stream.iterate(start_step):
        yield {name: batch[source.site][0] for name, source in sources.items()}
