"""Measures the operations and the step of one shape, each in turns with what it is compared to."""

import sys
from collections.abc import Iterator, Sequence

import jax

from pallas_kernels.bench import dense, inputs, ops, report, steps
from pallas_kernels.bench.inputs import Inputs
from pallas_kernels.bench.report import Row
from pallas_kernels.bench.settings import Settings
from pallas_kernels.bench.timing import Samples, alternate, median
from pallas_kernels.shapes import Shape

_ROTATED_BYTES = 2**28  # of all sets of inputs together: more than the caches hold
_COPY_BYTES = 2**28
_MEMORY_SHARE = 0.6  # of what there is, that the dense step may take


def dtype_of(chosen: Settings) -> str:
    """Of the multiplications, with "auto" resolved as the library does."""
    if chosen.dtype != "auto":
        return chosen.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def shape_rows(name: str, shape: Shape, chosen: Settings) -> list[Row]:
    """Everything that was asked for at one shape; prints what it is at, and tables."""
    dtype = dtype_of(chosen)
    count = inputs.rotation(shape, dtype, _ROTATED_BYTES)
    pool = [inputs.make(shape, dtype, seed) for seed in range(count)]
    print(f"\n{report.title(name, shape, dtype, count)}", flush=True)
    rows = list(_denominators(name, shape, pool, chosen))
    for op in chosen.ops:
        if op != "step":
            progress(f"{name}: {op}")
            rows += _operation(name, shape, op, pool, chosen)
    print(report.table(rows), flush=True)
    if "step" in chosen.ops:
        progress(f"{name}: step")
        of_step = _step(name, shape, pool, chosen)
        print("", report.table(of_step), sep="\n", flush=True)
        rows += of_step
    return rows


def progress(text: str) -> None:
    """One line for whoever waits, apart from the figures."""
    print(text, file=sys.stderr, flush=True)


def _denominators(
    name: str, shape: Shape, pool: Sequence[Inputs], chosen: Settings
) -> Iterator[Row]:
    copy, copied = ops.copy(_COPY_BYTES)
    measured = alternate(ops.encoders(pool) | {"copy": copy}, chosen.repeats)
    flops = 2 * shape.tokens * shape.n * shape.d
    notes = {
        label: f"{flops / median(measured[label].wall) / 1e12:.3g} TFLOP/s"
        for label in ("encoder", "encoder in place")
    }
    notes["copy"] = f"{copied / median(measured['copy'].wall) / 1e9:.3g} GB/s, read and written"
    for label, samples in measured.items():
        yield Row(shape=name, op=label, implementation="XLA", samples=samples, note=notes[label])


def _operation(
    name: str, shape: Shape, op: str, pool: Sequence[Inputs], chosen: Settings
) -> list[Row]:
    """One operation by every implementation that was asked for, or can run."""
    case = ops.CASES[op](shape, pool)
    wanted = chosen.implementations or [i for i in ops.IMPLEMENTATIONS if i != "reference"]
    against = {i: case.reason_against(i) for i in wanted}
    for implementation in chosen.implementations:
        if against[implementation] is not None:
            print(f"not measured: {against[implementation]}")
    copy, copied = ops.copy(_COPY_BYTES)
    whole = case.tokens in (None, shape.tokens)
    denominators = ops.encoders(pool) if whole else {}
    timed = [*(i for i in wanted if against[i] is None), *case.others]
    runs = {i: case.run(i) for i in timed} | denominators | {"copy": copy}
    measured = alternate(runs, chosen.repeats)
    rows = []
    for implementation in timed:
        samples = measured[implementation]
        wall, cpu = report.ratios_to(samples, measured)
        least = measured["copy"].wall * case.moved / copied
        rows.append(
            Row(
                shape=name,
                op=op,
                implementation=implementation,
                samples=samples,
                ratios=wall,
                cpu_ratios=cpu,
                copy_share=report.ratio(least, samples.wall),
                note="" if whole else f"{case.tokens} tokens only",
            )
        )
    return rows


def _step(name: str, shape: Shape, pool: Sequence[Inputs], chosen: Settings) -> list[Row]:
    """The whole step, with nothing dead and with some, and the dense one."""
    dtype = dtype_of(chosen)
    runs, memory = {}, {}
    some = f"step, {inputs.DEAD_SHARE:.0%} dead"
    for implementation in chosen.implementations or (None,):
        sparse = steps.sparse(
            shape,
            pool,
            dtype,
            microbatch=chosen.microbatch_size,
            implementation=implementation,
        )
        print(f"\nthe step's operations:\n{sparse.picks}", flush=True)
        by = implementation or "picked"
        runs |= {("step", by): sparse.run(False), (some, by): sparse.run(True)}
        memory |= {("step", by): sparse.memory, (some, by): sparse.memory}
    needed, there = dense.bytes_needed(shape), dense.memory_limit()
    if needed < _MEMORY_SHARE * there:
        label = ("dense step", "autodiff")
        runs[label], memory[label] = dense.dense(shape, pool, dtype)
    else:
        print(
            f"dense step: not measured, it needs about {needed / 2**30:.0f} GiB of the "
            f"{there / 2**30:.0f} there are"
        )
    encoders = {(label, "XLA"): run for label, run in ops.encoders(pool).items()}
    measured = alternate(runs | encoders, chosen.repeats)
    under = {op: samples for (op, by), samples in measured.items() if by in ("XLA", "autodiff")}

    def row(op: str, by: str, samples: Samples, **more) -> Row:
        wall, cpu = report.ratios_to(samples, under)
        rest = {"ratios": wall, "cpu_ratios": cpu, **more}
        return Row(shape=name, op=op, implementation=by, samples=samples, **rest)

    rows = []
    for op, by in runs:
        samples = measured[op, by]
        rate = shape.tokens / median(samples.wall)
        rows.append(row(op, by, samples, tokens_per_second=rate, memory=memory[op, by]))
        if op == some:
            extra = samples.minus(measured["step", by])
            rows.append(row("auxk", by, extra, note="the difference of both steps"))
            rows[-1].ratios.pop("dense step", None)
    return rows
