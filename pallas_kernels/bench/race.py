"""The race against other trainers: time of a step, and quality after equal tokens.

Every trainer sees the same batches in the same order; in each turn all of them make one step, so
that the machine is the same for all. Drawing the data is not timed.
"""

import contextlib
import io
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from pallas_kernels.bench import report, steps, trainers
from pallas_kernels.bench.inputs import DEAD_SHARE
from pallas_kernels.bench.measure import progress
from pallas_kernels.bench.report import Row
from pallas_kernels.bench.settings import Settings
from pallas_kernels.bench.timing import WARM_UP, Run, alternate, median
from pallas_kernels.shapes import Shape

_PAUSE = 0.01  # seconds, in which OpenMP's threads stop spinning
_TIMED_BATCHES = 8
_SAMPLE, _HELD_OUT = 16_384, 16_384
_DEAD_SHARE_OF_RACE = 20  # a latent is dead after this part of the tokens
_SITES = ("1.resid_post", "1.mlp_hidden")  # of the embedded language model
_STORED, _CONTEXTS = 1_200_000, 1024


def run(name: str, shape: Shape, chosen: Settings) -> tuple[list[Row], dict[str, Any]]:
    """Races at one shape.

    Returns:
      Rows of the timed steps, and what the equal-token race gave, for the JSON.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        source, described = _source(shape, chosen.race_tokens, folder)
        sample_ND = np.asarray(source.batches.sample_rows(_SAMPLE), np.float32)
        print(f"\n{name}: race on {described}", flush=True)
        rows = _timed_steps(name, shape, sample_ND, chosen)
        print(report.table(rows), flush=True)
        result = {"shape": name, "data": described, "trainers": []}
        if chosen.race_tokens:
            result |= _equal_tokens(name, shape, source, sample_ND, chosen)
            print(_table(result), flush=True)
    return rows, result


def _source(shape: Shape, tokens: int, folder: str) -> tuple[Any, str]:
    """Activations of the embedded language model if it has a site as wide, else synthetic ones."""
    from saejax.data.loader import LoaderConfig
    from saejax.data.synthetic import SyntheticConfig
    from saejax.mesh import MeshShape, make_mesh
    from saejax.model.sae import SAEConfig
    from saejax.sources import open_source
    from saejax.subjects.harvest import HarvestConfig
    from saejax.subjects.hf import load_subject

    subject = load_subject("embedded")
    site = next((s for s in _SITES if subject.width(s) == shape.d), None)
    fits = max(shape.tokens, _CONTEXTS) % min(shape.tokens, _CONTEXTS) == 0
    if site is not None and fits:
        stored = max(min(tokens, _STORED), 4 * shape.tokens)
        config = HarvestConfig(site=site, tokens=stored, contexts_per_shard=_CONTEXTS)
        described = f"{stored} activations of the embedded language model at {site}"
    else:
        config = SyntheticConfig(
            features=shape.n,
            d_model=shape.d,
            mean_l0=min(2 * shape.k, shape.n / 4),
            held_out_rows=_HELD_OUT,
        )
        described = (
            f"synthetic activations: {config.features} features, {config.mean_l0:g} active a token "
            f"in the mean, probabilities by a power law of exponent {config.exponent:g}"
        )
    sae = SAEConfig(d_model=shape.d, n_latents=shape.n, k=shape.k)
    where = pathlib.Path(folder) / "activations"
    mesh = make_mesh(MeshShape())
    return open_source(config, sae, LoaderConfig(), shape.tokens, where, mesh), described


def _build(terms: trainers.Terms, chosen: Settings) -> dict[str, trainers.Trainer]:
    """The trainers by name; what their packages print and warn of at import is dropped."""
    suffix = "" if terms.rate_factor == 1 else f" x{terms.rate_factor:g}"
    built = {}
    for make in trainers.everyone(chosen.against):
        progress(f"building {make.name}{suffix}")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built[make.name + suffix] = make(terms)
    return built


def _timed_steps(name: str, shape: Shape, sample_ND: np.ndarray, chosen: Settings) -> list[Row]:
    """One step of every trainer, AuxK on, with dead latents and without."""
    terms = trainers.Terms(shape, steps.STEPS, steps.DEAD_TOKENS, sample_ND)
    built = _build(terms, chosen)
    batches = [
        sample_ND[np.arange(i * shape.tokens, (i + 1) * shape.tokens) % len(sample_ND)]
        for i in range(_TIMED_BATCHES)
    ]
    placed = {label: [t.place(x) for x in batches] for label, t in built.items()}
    dead_L = np.random.default_rng(0).random(shape.n) < DEAD_SHARE
    rows = []
    for op, mask_L in ((f"step, {DEAD_SHARE:.0%} dead", dead_L), ("step", np.zeros_like(dead_L))):
        progress(f"{name}: race, {op}")
        runs = {
            label: Run(
                lambda i, t=trainer, x=placed[label]: t.update(x[i % _TIMED_BATCHES]),
                lambda i, t=trainer, mask_L=mask_L: t.mark_dead(mask_L),
            )
            for label, trainer in built.items()
        }
        measured = alternate(runs, chosen.repeats, pause=_PAUSE)
        for label, samples in measured.items():
            wall, cpu = report.ratios_to(samples, measured)
            rows.append(
                Row(
                    shape=name,
                    op=op,
                    implementation=label,
                    samples=samples,
                    ratios=wall,
                    cpu_ratios=cpu,
                    tokens_per_second=shape.tokens / median(samples.wall),
                )
            )
    return rows


def _equal_tokens(
    name: str, shape: Shape, source: Any, sample_ND: np.ndarray, chosen: Settings
) -> dict[str, Any]:
    """Trains everyone on the same tokens in the same order and measures all on held-out ones."""
    count = max(chosen.race_tokens // shape.tokens, WARM_UP + 1)
    dead_tokens = max(chosen.race_tokens // _DEAD_SHARE_OF_RACE, 4 * shape.tokens)
    built = {}
    for factor in chosen.race_rates:
        terms = trainers.Terms(shape, count, dead_tokens, sample_ND, factor)
        built |= _build(terms, chosen)
    batch = _Batches(source.batches.iterate(0), f"{name}: race", count)
    placed = {}

    def place(label: str, i: int):
        placed[label] = built[label].place(batch(i))

    runs = {
        label: Run(
            lambda i, label=label: built[label].update(placed[label]),
            lambda i, label=label: place(label, i),
        )
        for label in built
    }
    # The repetitions that warm up train as well.
    measured = alternate(runs, count - WARM_UP, pause=_PAUSE)
    held_out_ND = _held_out(source)
    return {
        "tokens": count * shape.tokens,
        "dead_tokens": dead_tokens,
        "held_out_tokens": len(held_out_ND),
        "trainers": [
            {
                "name": label,
                "recipe": trainer.recipe,
                "nmse": normalized_error(trainer, held_out_ND, shape.tokens),
                "dead_share": trainer.dead() / shape.n,
                "tokens_per_second": shape.tokens / median(measured[label].wall),
                "median_ms": 1e3 * median(measured[label].wall),
                "median_cpu_ms": 1e3 * median(measured[label].cpu),
            }
            for label, trainer in built.items()
        ],
    }


class _Batches:
    """The batches of a stream by their number, each asked for by everyone before the next."""

    def __init__(self, stream: Iterator[np.ndarray], label: str, count: int):
        self._stream, self._label, self._count = stream, label, count
        self._number, self._batch = -1, None

    def __call__(self, i: int) -> np.ndarray:
        while self._number < i:
            self._number += 1
            self._batch = np.asarray(next(self._stream), np.float32)
            if self._number * 10 % self._count < 10:
                progress(f"{self._label}, step {self._number} of {self._count}")
        return self._batch


def _held_out(source: Any) -> np.ndarray:
    blocks, rows = [], 0
    for block in source.held_out():
        blocks.append(np.asarray(block, np.float32).reshape(-1, block.shape[-1]))
        rows += len(blocks[-1])
        if rows >= _HELD_OUT:
            break
    return np.concatenate(blocks)[:_HELD_OUT]


def normalized_error(trainer: trainers.Trainer, x_ND: np.ndarray, batch: int) -> float:
    """Sum of squared errors over that of the best constant, in float64."""
    error = 0.0
    for start in range(0, len(x_ND), batch):
        x_BD = x_ND[start : start + batch]
        error += float(np.square(trainer.reconstruct(x_BD) - x_BD, dtype=np.float64).sum())
    return error / float(np.square(x_ND - x_ND.mean(0), dtype=np.float64).sum())


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"after {result['tokens']:,} tokens (dead after {result['dead_tokens']:,}), on "
        f"{result['held_out_tokens']:,} held-out ones:",
        f"{'trainer':<24}{'NMSE':>9}{'dead':>8}{'ms':>9}{'cpu ms':>9}{'tokens/s':>11}  optimizer",
    ]
    lines += [
        f"{t['name']:<24}{t['nmse']:>9.4f}{t['dead_share']:>8.1%}{t['median_ms']:>9.3g}"
        f"{t['median_cpu_ms']:>9.3g}{t['tokens_per_second']:>11,.0f}  {t['recipe']}"
        for t in result["trainers"]
    ]
    return "\n".join(lines)
