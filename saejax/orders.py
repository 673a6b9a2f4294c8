"""How much the order of the training rows matters: the same training from the same activations.

  python -m saejax.orders runs/quickstart --tokens 400000

Held-out normalized MSE of autoencoders trained on a store's activations in the order of the text,
with contexts permuted, through the stream's swap buffer, by the store's own loader, and in an exact
permutation. Everything but the order is the same, seeds included.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.checkpoint import CheckpointConfig
from saejax.data.feed import Ranges, check_ranges, take
from saejax.data.layout import CONTEXT_STREAM, permutation, random_keys
from saejax.data.loader import Loader, LoaderConfig
from saejax.data.shards import Store, open_store
from saejax.data.stream_plan import ROW_STREAM, StreamPlan
from saejax.evals.suite import reconstruct
from saejax.fit import fit
from saejax.model.sae import SAEConfig
from saejax.recipe import Recipe
from saejax.sources import contexts_of
from saejax.subjects.harvest import HarvestConfig
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig

_EXACT_STREAM = 9
_BUFFERS = (16, 64)
_GROUP_CONTEXTS = HarvestConfig.batch_contexts
_EVALUATED_AT_ONCE = 4096


class OrderedRows:
    """Rows of an array in a given order, behind the interface of `Loader`."""

    def __init__(self, rows_ND: np.ndarray, order_N: np.ndarray, batch_size: int):
        """Keeps references; the order is repeated when it ends."""
        self._rows, self._order = rows_ND, order_N
        self.batch_size, self.d_model = batch_size, rows_ND.shape[1]
        self.tokens_per_epoch = len(order_N)

    def iterate(self, start_step: int = 0, ranges: Ranges | None = None) -> Iterator[np.ndarray]:
        """Batches from `start_step` on, without end."""
        step, size = start_step, self.batch_size
        while True:
            places = np.arange(step * size, (step + 1) * size) % len(self._order)
            yield self._rows[take(self._order[places], check_ranges(ranges, size))]
            step += 1


class SameSample:
    """A source whose statistics come from rows that all compared ones share."""

    def __init__(self, batches: Any, sample_ND: np.ndarray):
        """Takes batches from one place, and the sample from another."""
        self._sample = sample_ND
        self.iterate, self.d_model = batches.iterate, batches.d_model
        self.tokens_per_epoch = len(sample_ND)

    def sample_rows(self, n: int) -> np.ndarray:
        """The first n rows of the sample."""
        return self._sample[:n]


def text_order(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[N, D]` of a store in the order of its text, and each one's context `[N]`, from 0."""
    blocks = list(contexts_of(store))
    ids, rows, stored = (
        np.concatenate([part(block) for block in blocks])
        for part in (
            lambda b: b.ids,
            lambda b: b.rows,
            lambda b: np.ones(b.rows.shape[:2], bool) if b.stored is None else b.stored,
        )
    )
    order = np.argsort(ids, kind="stable")
    rows, stored = rows[order], stored[order]
    context = np.broadcast_to(np.arange(len(rows))[:, None], stored.shape)
    return rows[stored], context[stored]


def contexts_permuted(context_N: np.ndarray, seed: int) -> np.ndarray:
    """An order of rows in which contexts are permuted and the rows of each stay together."""
    rank = np.argsort(permutation(int(context_N.max()) + 1, seed, CONTEXT_STREAM))
    return np.argsort(rank[context_N], kind="stable")


def through_swap_buffer(context_N: np.ndarray, batch_size: int, batches: int, seed: int):
    """The order in which `data.stream` gives rows, with one lane and no row left out.

    The rows of the contexts that share a forward pass enter the buffer in random order.
    """
    source = contexts_permuted(context_N, seed)
    contexts = np.cumsum(np.diff(context_N[source], prepend=-1) != 0) - 1
    keys = random_keys((len(source),), seed, ROW_STREAM, 0)
    source = source[np.lexsort((keys, contexts // _GROUP_CONTEXTS))]
    plan = StreamPlan(
        n_contexts=1,
        kept=np.array([len(source)]),
        lanes=1,
        group_contexts=1,
        batch_size=batch_size,
        buffer_batches=batches,
        seed=seed,
    )
    slots = source[np.arange(plan.slots) % len(source)]
    order = []
    for step in range(len(source) // batch_size):
        taken = plan.slots_of(step)[0]
        order.append(slots[taken].copy())
        slots[taken] = source[np.arange(*plan.fresh(step)) % len(source)]
    return np.concatenate(order)


def all_orders(
    store: Store, batch_size: int, seed: int
) -> tuple[np.ndarray, dict[str, Callable[[], Any]]]:
    """The rows in the order of an exact permutation, and by name what makes each source."""
    rows_ND, context_N = text_order(store)
    exact = permutation(len(rows_ND), seed, _EXACT_STREAM)

    def ordered(order: np.ndarray) -> Callable[[], OrderedRows]:
        return lambda: OrderedRows(rows_ND, order, batch_size)

    found = {
        "exact permutation": ordered(exact),
        "order of the text": ordered(np.arange(len(rows_ND))),
        "contexts permuted": ordered(contexts_permuted(context_N, seed)),
    }
    for batches in _BUFFERS:
        order = through_swap_buffer(context_N, batch_size, batches, seed)
        found[f"stream, buffer of {batches} batches"] = ordered(order)
    found["store"] = lambda: Loader(store, batch_size, LoaderConfig(seed=seed))
    return rows_ND[exact], found


def measure(
    activations: str, recipe: Recipe, seeds: Sequence[int], log: Callable[[str], None] = print
) -> dict[str, list[float]]:
    """Held-out normalized MSE by order, one for each seed.

    Args:
      activations: folder (or URL) of the stores 'train' and 'held_out'.
      recipe: the training; its seed is replaced.
      seeds: of weights and orders.
      log: takes a line for each training.

    Raises:
      ValueError: the store has fewer rows than the training takes, so that orders would repeat.
    """
    train, held_out = (open_store(f"{activations}/{split}") for split in ("train", "held_out"))
    needed = recipe.train.steps * recipe.train.batch_size
    if needed > train.n_rows:
        raise ValueError(
            f"--tokens {needed}: the store at {train.path} has {train.n_rows} rows; give at most "
            "that, because the orders are compared over one epoch"
        )
    figures: dict[str, list[float]] = {}
    for seed in seeds:
        own = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=seed))
        sample, sources = all_orders(train, recipe.train.batch_size, seed)
        for name, make in sources.items():
            nmse = _train(own, SameSample(make(), sample), held_out)
            figures.setdefault(name, []).append(nmse)
            log(f"seed {seed}, {name}: {nmse:.4f}")
    return figures


def _train(recipe: Recipe, source: SameSample, held_out: Store) -> float:
    with tempfile.TemporaryDirectory(prefix="saejax-") as folder:
        place = pathlib.Path(folder)
        fitted = fit(recipe, source, identity={}, checkpoints=place / "checkpoints", write_to=place)
        blocks = (block.stored_rows() for block in contexts_of(held_out))
        return reconstruct(fitted.sae, blocks, batch_size=_EVALUATED_AT_ONCE).normalized.nmse


def format_table(figures: Mapping[str, Sequence[float]]) -> str:
    """Mean and range over the seeds, and the difference from an exact permutation."""
    exact = statistics.fmean(figures["exact permutation"])
    lines = [f"{'order':<30} {'NMSE':>7} {'range':>15} {'against exact':>14}"]
    for name, values in figures.items():
        mean, ends = statistics.fmean(values), f"{min(values):.4f}-{max(values):.4f}"
        lines.append(f"{name:<30} {mean:>7.4f} {ends:>15} {mean / exact - 1:>+13.1%}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 1 with one line on stderr after a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m saejax.orders",
        description="What the order of the training rows costs, on the activations of a run.",
    )
    parser.add_argument("workdir", help="run directory with activations, runs/quickstart")
    parser.add_argument("--tokens", type=int, default=400_000, help="of every training")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--latents", type=int, default=2048)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    asked = parser.parse_args(argv)
    activations = str(pathlib.Path(asked.workdir) / "activations")
    try:
        width = open_store(f"{activations}/train").spec.d_model
        recipe = Recipe(
            sae=SAEConfig(d_model=width, n_latents=asked.latents, k=asked.k),
            train=TrainConfig(tokens=asked.tokens, batch_size=asked.batch_size, log_every=100),
            loss=LossConfig(dead_tokens=100_000),
            optimizer=OptimizerConfig(
                learning_rate=asked.learning_rate, decay="linear", ema_decay=0.99
            ),
            checkpoint=CheckpointConfig(every_steps=asked.tokens, keep=1),
        )
        figures = measure(activations, recipe, asked.seeds)
    except (ValueError, OSError) as error:
        print(f"saejax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(format_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
