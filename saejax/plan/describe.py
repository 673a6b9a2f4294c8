"""The plan as text."""

from collections.abc import Iterable, Sequence

import numpy as np

from saejax.plan import search
from saejax.plan.compiled import Compiled, Refused
from saejax.plan.estimate import PRODUCT_EFFICIENCY, Estimate
from saejax.plan.hardware import Topology
from saejax.plan.hlo import Collective
from saejax.plan.workload import DEAD_FRACTION, Workload

_LABEL = 36
_SHOWN = 6

ASSUMPTIONS = (
    f"analytic, also of the collectives; products at {PRODUCT_EFFICIENCY:.0%} of the peak rate, "
    f"memory and links at their own rate, nothing overlapped, {DEAD_FRACTION:.0%} of the latents "
    f"dead"
)


def head(work: Workload) -> list[str]:
    """What is trained, on which mesh."""
    recipe, shape = work.recipe, work.shape
    train, sae = recipe.train, recipe.sae
    return [
        f"mesh        data {shape.data} x latent {shape.latent} = {shape.size} devices",
        f"training    {train.steps:,} steps of {train.batch_size:,} tokens "
        f"({train.steps * train.batch_size:,} tokens), {work.spec.chunks} microbatches a step",
        f"rate        {recipe.optimizer.resolve_learning_rate(sae.n_latents):.3g}, k_aux "
        f"{work.spec.loss.aux.k}",
        *_selection(work),
    ]


def _selection(work: Workload) -> list[str]:
    if work.shape.latent == 1:
        return []
    wanted = work.spec.loss.main
    exact = wanted.capacity >= min(wanted.k, work.latents)
    return [f"capacity    {wanted.capacity} candidates of each shard for k = {wanted.k}"
            + (" (exact)" if exact else "")]  # fmt: skip


def hardware(topology: Topology, source: str) -> list[str]:
    """The devices, and where memory and collectives come from."""
    chip = topology.chip
    text = f"hardware    {topology.devices} x {chip.name}"
    if chip.kind != "cpu":
        text += (
            f": {size(chip.memory)}, {chip.bf16_flops / 1e12:,.0f} TFLOP/s in bfloat16, "
            f"{chip.bandwidth / 1e9:,.0f} GB/s each"
        )
    return [text, f"source      {source}"]


def parameters(work: Workload) -> list[str]:
    """Every parameter and their number."""
    lines = ["parameters  shape (whole)                 count"]
    total = 0
    for name, shape in work.recipe.sae.param_shapes().items():
        count = int(np.prod(shape, dtype=np.int64))
        total += count
        lines.append(f"  {name:<12}{'x'.join(map(str, shape)):<{_LABEL - 12}}{count:>18,}")
    return [*lines, f"  {'total':<{_LABEL}}{total:>18,}"]


def memory(estimate: Estimate, compiled: Compiled | Refused | None) -> list[str]:
    """Bytes of a device, by part, and whether its memory holds them."""
    lines = ["bytes per device (analytic, all latents dead at worst)"]
    lines += [_row(part, size(count)) for part, count in estimate.memory.items()]
    lines.append(_row("total", size(estimate.peak)))
    peak, word = estimate.peak, "estimate"
    if isinstance(compiled, Compiled):
        lines.append(_row("compiled: state and batch", size(compiled.arguments)))
        lines.append(_row("compiled: everything in between", size(compiled.temporaries)))
        lines.append(_row("compiled: total", size(compiled.peak)))
        lines.append(_row("compiled: at the fullest moment", size(compiled.live)))
        peak, word = compiled.live, "compiled program"
    limit = estimate.work.topology.chip.memory
    if isinstance(compiled, Refused):
        needed = f": {compiled.needed} of {compiled.available}" if compiled.needed else ""
        return [*lines, f"memory      DOES NOT FIT: the compiler refuses the step{needed}"]
    if not limit:
        return lines
    verdict = "fits" if peak <= limit else "DOES NOT FIT"
    share = f"the {word} takes {size(peak)} of {size(limit)} ({peak / limit:.0%})"
    return [*lines, f"memory      {verdict}: {share}"]


def flops(work: Workload) -> list[str]:
    """Operations per token, of the whole mesh, and per step and device."""
    lines = [f"FLOPs per token (whole mesh; {DEAD_FRACTION:.0%} of the latents dead)"]
    per_step = work.flops()
    scale = work.shape.size / work.recipe.train.batch_size
    lines += [_row(part, f"{count * scale:,.0f}") for part, count in per_step.items() if count]
    lines.append(_row("total", f"{sum(per_step.values()) * scale:,.0f}"))
    return [*lines, _row("per step and device", f"{sum(per_step.values()):.3e}")]


def collectives(estimate: Estimate, rows: Sequence[Collective], source: str) -> list[str]:
    """Every collective of a step, as the arithmetic or the compiler has it."""
    if not rows:
        return ["collectives: none"]
    lines = [
        f"collectives, per device and step ({source}); bytes of the full array",
        f"  {'name':<26}{'kind':<20}{'axis':<14}{'calls':>6}{'MB':>13}{'ms':>9}",
    ]
    timed = estimate.work.topology.chip.kind != "cpu"
    for one in rows:
        time = f"{1e3 * estimate.collective_seconds(one):,.2f}" if timed else ""
        lines.append(
            f"  {one.name:<26}{one.kind:<20}{one.axis:<14}{one.calls:>6,.0f}"
            f"{one.bytes / 1e6:>13,.3f}{time:>9}".rstrip()
        )
    return lines


def times(estimate: Estimate) -> list[str]:
    """Expected time of a step, by part, and the floors under it."""
    lines = [f"milliseconds per step (expected: {ASSUMPTIONS})"]
    parts = estimate.seconds
    lines += [_row(part, f"{1e3 * time:,.2f}") for part, time in parts.items()]
    total, most = estimate.step_seconds, max(parts, key=parts.get)
    floors = ", ".join(f"{name} {1e3 * t:,.1f} ms" for name, t in estimate.floors.items())
    return [
        *lines,
        _row("total", f"{1e3 * total:,.2f}"),
        f"floors      {floors}",
        f"speed       {estimate.tokens_per_second:,.0f} tokens/s expected, dominated by "
        f"{most} ({parts[most] / total:.0%})",
    ]


def table(ranked: Sequence[Estimate], configured: Estimate) -> list[str]:
    """The best mesh shapes, each with its microbatch, and the configured one."""
    lines = [
        "search      mesh and microbatch by expected time, where memory holds them (analytic);",
        f"            first the one of least memory within {search.AS_FAST - 1:.0%} of the fastest",
        f"  {'mesh':<14}{'microbatch':>10}{'memory':>12}{'ms':>12}{'tokens/s':>14}",
    ]
    shown = list(ranked[:_SHOWN])
    if not any(_same(e, configured) for e in shown):
        shown.append(configured)
    for estimate in shown:
        recipe = estimate.work.recipe
        block = recipe.train.microbatch_size or recipe.train.batch_size // estimate.work.shape.data
        note = "" if estimate.fits() else "  does not fit"
        note += "  (configured)" if _same(estimate, configured) else ""
        lines.append(
            f"  {estimate.work.shape!s:<14}{block:>10,}{size(estimate.peak):>12}"
            f"{1e3 * estimate.step_seconds:>12,.1f}{estimate.tokens_per_second:>14,.0f}{note}"
        )
    return lines


def _same(one: Estimate, other: Estimate) -> bool:
    return (one.work.shape, one.work.block) == (other.work.shape, other.work.block)


def recommendation(choice: Estimate | None, note: str) -> list[str]:
    """One mesh and microbatch, as lines of a gin file; or why there is none."""
    if choice is None:
        return [f"recommended none: {note}"]
    return [f"recommended ({note})", *(f"  {line}" for line in search.bindings(choice))]


def join(parts: Iterable[Sequence[str]]) -> str:
    """Sections as one text, an empty line between them."""
    return "\n\n".join("\n".join(part) for part in parts if part)


def _row(label: str, value: str) -> str:
    return f"  {label:<{_LABEL}}{value:>18}"


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
