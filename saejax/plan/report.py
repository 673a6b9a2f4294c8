"""The whole plan of a recipe: compiled where it can be, searched, described."""

import dataclasses
import logging
from collections.abc import Sequence

import jax

from saejax.mesh import shapes_of
from saejax.plan import describe, search
from saejax.plan.compiled import Compiled, Refused, compile_step, devices_of, why_not_compiled
from saejax.plan.estimate import Estimate
from saejax.plan.hardware import CHIPS, Topology, parse_topology, topology_of
from saejax.plan.search import choose_mesh
from saejax.plan.traffic import expected_collectives
from saejax.plan.workload import DEAD_FRACTION, Workload
from saejax.recipe import Recipe

_log = logging.getLogger(__name__)

_COMPILED_AT_MOST = 3  # recommendations tried, each a compilation
_ESTIMATED_TOO_HIGH = 1.1  # at most, of the memory that is compiled
_NOTHING_FITS = (
    "NOTHING FITS; take more devices, Optimizer.ema_decay = None, or a smaller SAE.n_latents"
)


def report(recipe: Recipe, topology: str | None = None) -> str:
    """The plan of a recipe as text.

    Args:
      recipe: what to train.
      topology: hardware to plan for, see `hardware.parse_topology`; None is what is present, for
        which nothing is compiled and nothing searched.

    Raises:
      ValueError: the topology is not known, or the mesh does not fit it.
    """
    if topology is None:
        return _of_present(recipe)
    target = parse_topology(topology)
    where = f"of --topology={target.name}"
    shape = choose_mesh(recipe, target.devices, target, where=where)
    if shape.size != target.devices:
        fitting = ", ".join(f"({s.data}, {s.latent})" for s in shapes_of(target.devices))
        raise ValueError(
            f"Mesh.mesh_shape = ({shape.data}, {shape.latent}) takes {shape.size} devices, but "
            f"--topology={target.name} has {target.devices}; use one of {fitting}, or 'auto'"
        )
    devices = devices_of(target)
    configured = Estimate(Workload(recipe, shape, target))
    result = compile_for(configured, devices)
    rows, short = configured.collectives, f"analytic, {DEAD_FRACTION:.0%} of the latents dead"
    if isinstance(result, Compiled) and result.collectives is not None:
        rows, short = result.collectives, "compiled, all latents dead, times by these bytes"
    sections = [
        describe.head(configured.work) + describe.hardware(target, _source(target, result)),
        describe.parameters(configured.work),
        describe.memory(configured, result),
        describe.flops(configured.work),
        describe.collectives(configured, rows, short),
    ]
    if target.chip.kind != "cpu":
        ranked = search.candidates(recipe, target)
        choice, note = _recommend(ranked, configured, result, devices)
        sections += [
            describe.times(configured),
            describe.table(ranked, configured),
            describe.recommendation(choice, note),
        ]
    return describe.join(sections)


def _of_present(recipe: Recipe) -> str:
    """For the devices that JAX sees, as many of their kind as the mesh asks for."""
    present = jax.devices()
    target = topology_of(present)
    shape = choose_mesh(recipe, len(present), target)
    known = target is not None
    target = target or Topology(name="unknown", chip=CHIPS["cpu"], devices=shape.size)
    if target.devices != shape.size:
        target = dataclasses.replace(target, devices=shape.size, sides=())
    estimate = Estimate(Workload(recipe, shape, target))
    sections = [
        describe.head(estimate.work),
        describe.parameters(estimate.work),
        describe.memory(estimate, None),
        describe.flops(estimate.work),
        describe.collectives(estimate, estimate.collectives, "analytic"),
    ]
    if known and target.chip.kind != "cpu":
        sections.append(describe.times(estimate))
    sections.append(
        ["--topology=v5p:8x8x8 (or v6e:16x16, gpu:H100x512, cpu:8, ...) plans for that hardware"]
    )
    return describe.join(sections)


def compile_for(
    estimate: Estimate, devices: Sequence[jax.Device] | None
) -> Compiled | Refused | None:
    """The step of an estimate compiled for these devices; None where there are none."""
    if devices is None:
        return None
    work = estimate.work
    _log.info("compiling %s for %s ...", work.shape, work.topology.name)
    expected = expected_collectives(work, largest_auxk=True)
    return compile_step(work.recipe, list(devices), work.shape, expected)


def _source(target: Topology, result: Compiled | Refused | None) -> str:
    """Where memory and collectives come from."""
    if result is None:
        return f"analytic: {why_not_compiled(target)}"
    if isinstance(result, Refused):
        return "the step was compiled, and refused for its memory; the rest is analytic"
    took = f"of the step compiled for it, in {result.seconds:.0f} s"
    if result.collectives is None:
        return (
            f"memory {took}; its collectives could not be read ({result.unread}): they and times "
            f"are analytic"
        )
    return f"memory and collectives {took}; times are analytic"


def _recommend(
    ranked: Sequence[Estimate],
    configured: Estimate,
    result: Compiled | Refused | None,
    devices: Sequence[jax.Device] | None,
) -> tuple[Estimate | None, str]:
    """The best of the search that the compiler, where there is one, does not refuse, and a note."""
    if not ranked:
        return configured, "nothing else divides the latents and the batch"
    if devices is None:
        return (ranked[0], "analytic") if ranked[0].fits() else (None, _NOTHING_FITS)
    for choice in ranked[:_COMPILED_AT_MOST]:
        if not choice.fits(int(choice.peak / _ESTIMATED_TOO_HIGH)):
            break  # no use in compiling
        same = (choice.work.shape, choice.work.recipe.train) == (
            configured.work.shape,
            configured.work.recipe.train,
        )
        found = result if same else compile_for(choice, devices)
        if isinstance(found, Compiled) and choice.fits(found.live):
            return choice, f"compiled: {describe.size(found.live)} a device"
    return None, _NOTHING_FITS
