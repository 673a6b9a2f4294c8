"""`python -m saejax.store_bench`: the activation store against plain files and plain passes.

Each figure is a ratio of two things done in turn in one process: durable writes (fsync on both
sides), sequential and shuffled reads with cold caches, a harvest and the forward passes in it.
Writes go in turn by two shards, because the speed of a shared disk scatters from one second to the
next; reads by all there is. Before each turn memory and caches are made ready, or else the side
that comes second pays for the pages that the first took. Absolute rates depend on the machine; the
ratios do less.
"""

import argparse
import concurrent.futures
import itertools
import json
import mmap
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import ml_dtypes
import numpy as np

from saejax import allocator
from saejax.data.corpus import TextConfig
from saejax.data.loader import Loader
from saejax.data.shards import Store, StoreSpec, open_store
from saejax.fit import fit
from saejax.model.sae import SAEConfig
from saejax.recipe import Recipe
from saejax.subjects.filling import make_forward
from saejax.subjects.harvest import HarvestConfig, harvest, read_contexts
from saejax.subjects.hf import load_subject
from saejax.train.loop import TrainConfig

WIDTH, LENGTH, BATCH = 768, 64, 8192
_BLOCK = 1 << 22
_WRITERS = 2


def measure(folder: pathlib.Path, shards: int, contexts: int, repetitions: int) -> Iterator[dict]:
    """The figures, one after the other.

    Args:
      folder: a local folder with room for twice the store.
      shards: shards of the store, each of `contexts` x 63 rows of 768 bfloat16.
      contexts: contexts a shard, also rows of a chunk; divides or is a multiple of 8192.
      repetitions: of each side.
    """
    plain, path = folder / "plain.bin", folder / "store"

    data = [_acts(contexts, shard) for shard in range(shards)]
    size = sum(part.nbytes for part in data)

    def emptied() -> None:
        plain.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)

    _drain(_write_store(path, data))  # buffers and code are there from the first repetition on
    yield _figure(
        "durable write",
        lambda: _write_plain(plain, data),
        lambda: _write_store(path, data),
        repetitions,
        size,
        0.6,
        before=emptied,
        between=lambda: _touch_memory(size),
    )
    store = open_store(path)
    yield from _read_figures(folder, store, plain, repetitions)
    yield _wait_share(store, folder / "run")
    yield _harvest(folder, repetitions)


def _read_figures(
    folder: pathlib.Path, store: Store, plain: pathlib.Path, repetitions: int
) -> Iterator[dict]:
    """Reads of all rows in the order of the files, and as training reads them; caches are cold."""
    spec, size = store.spec, plain.stat().st_size
    chunk = spec.contexts_per_shard * WIDTH * 2

    def cold() -> None:
        _touch_memory(2 * size)
        for path in folder.rglob("*"):
            if path.is_file():
                _forget(path)

    def in_order() -> Iterator[None]:
        yield _drain(store.rows())

    def batch_by_batch() -> Iterator[None]:
        yield _drain(Loader(store, BATCH).iterate(0, store.n_rows // BATCH))

    shuffled = np.random.default_rng(0).permutation(size // chunk)
    yield _figure(
        "sequential read, cold",
        lambda: _read_plain(plain, range(0, size, _BLOCK), _BLOCK),
        in_order,
        repetitions,
        size,
        1.0,
        between=cold,
    )
    yield _figure(
        "shuffled read, cold",
        lambda: _read_plain(plain, (shuffled * chunk).tolist(), chunk),
        batch_by_batch,
        repetitions,
        size,
        1.0,
        between=cold,
    )


def _figure(
    name: str,
    plain: Callable[[], Iterator[None]],
    ours: Callable[[], Iterator[None]],
    repetitions: int,
    n_bytes: int,
    target: float,
    *,
    before: Callable[[], None] = lambda: None,
    between: Callable[[], None],
) -> dict:
    """Median rates in MB/s, and the median of the ratios of the repetitions.

    `before` runs ahead of each repetition, `between` ahead of each portion of a side; neither is
    timed.
    """
    pairs = []
    for _ in range(repetitions):
        before()
        pairs.append(_in_turn(plain(), ours(), between))
    ratios = [theirs / own for theirs, own in pairs]
    rates = [statistics.median(n_bytes / t / 1e6 for t in side) for side in zip(*pairs)]
    return {
        "name": name,
        "plain_mb_per_s": round(rates[0]),
        "store_mb_per_s": round(rates[1]),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "target": f">= {target}",
        "met": statistics.median(ratios) >= target,
    }


def _in_turn(
    plain: Iterator[None], ours: Iterator[None], between: Callable[[], None]
) -> tuple[float, float]:
    """Seconds of both sides, which go on by a portion in turn; both have as many."""
    seconds, ended, done = [0.0, 0.0], [False, False], object()
    while not all(ended):
        for i, side in enumerate((plain, ours)):
            between()
            began = time.perf_counter()
            ended[i] = next(side, done) is done
            seconds[i] += time.perf_counter() - began
    return seconds[0], seconds[1]


def _wait_share(store: Store, folder: pathlib.Path) -> dict:
    """Share of its time that training waits for batches of 8192 x 768 from the disk."""
    folder.mkdir()
    recipe = Recipe(
        sae=SAEConfig(d_model=WIDTH, n_latents=4096, k=32),
        train=TrainConfig(tokens=16 * BATCH, batch_size=BATCH, sample_rows=BATCH, log_every=8),
    )
    for path in pathlib.Path(store.path).rglob("0"):
        _forget(path)
    fit(
        recipe,
        Loader(store, BATCH),
        identity={"bench": "store"},
        checkpoints=folder / "checkpoints",
        write_to=folder,
        stop_requested=lambda: False,
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    share = max(record["wait_share"] for record in records[1:])  # without compilation
    rate = round(records[-1]["tokens_per_second"])
    return {
        "name": "wait share",
        "tokens_per_s": rate,
        "ratio": share,
        "target": "< 0.05",
        "met": share < 0.05,
    }


def _harvest(folder: pathlib.Path, repetitions: int) -> dict:
    """Time of a harvest over that of the same forward passes alone, tokenised and compiled."""
    subject = load_subject("embedded")
    text = TextConfig(max_bytes=2_000_000, cache=str(folder / "text"))
    cfg = HarvestConfig(tokens=120_000, held_out_tokens=4000, contexts_per_shard=256, text=text)
    sizes = {split: read_contexts(cfg, subject, split) for split in ("train", "held_out")}
    stores = harvest(cfg, folder / "harvest", str, subject=subject)[cfg.site]
    forward = make_forward(subject, cfg.all_sites, cfg.dtype, batch=64, contexts=256)

    def plain() -> None:
        for store, contexts in zip(stores, sizes.values()):
            n = store.spec.contexts_per_shard
            for start in range(0, store.spec.n_shards * n, n):
                part = slice(start, start + n)
                forward(np.asarray(contexts.tokens[part]), contexts.length[part])

    def ours() -> None:
        shutil.rmtree(folder / "harvest")
        harvest(cfg, folder / "harvest", str, subject=subject, forward=forward)

    plain()
    pairs = [(_seconds(plain), _seconds(ours)) for _ in range(repetitions)]
    ratios = [whole / passes for passes, whole in pairs]
    tokens = sum(store.spec.n_shards * store.spec.contexts_per_shard for store in stores) * LENGTH
    return {
        "name": "harvest over its forward",
        "forward_tokens_per_s": round(tokens / statistics.median(passes for passes, _ in pairs)),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "target": "<= 1.3",
        "met": statistics.median(ratios) <= 1.3,
    }


def _spec(shards: int, contexts: int) -> StoreSpec:
    return StoreSpec(
        subject="bench",
        subject_fingerprint="0",
        text_fingerprint="0",
        split="train",
        site="bench",
        d_model=WIDTH,
        context_length=LENGTH,
        contexts_per_shard=contexts,
        n_shards=shards,
        max_norm_ratio=10.0,
    )


def _acts(contexts: int, shard: int) -> np.ndarray:
    rows = np.random.default_rng(shard).standard_normal((contexts, LENGTH - 1, WIDTH), np.float32)
    return rows.astype(ml_dtypes.bfloat16)


def _write_store(path: pathlib.Path, data: Sequence[np.ndarray]) -> Iterator[None]:
    """As a harvest writes: two shards at once; a portion is two."""
    contexts = len(data[0])
    store, ids = open_store(path, _spec(len(data), contexts), "w"), np.arange(contexts)
    columns = {"tokens": np.zeros((contexts, LENGTH), np.uint16)}
    columns |= dict.fromkeys(("context", "document", "offset"), ids)
    with concurrent.futures.ThreadPoolExecutor(_WRITERS) as writers:
        for pair in _pairs(data):
            list(writers.map(lambda i: store.write_shard(i, data[i], **columns), pair))
            yield
    store.finish()


def _write_plain(path: pathlib.Path, data: Sequence[np.ndarray]) -> Iterator[None]:
    with path.open("wb", buffering=0) as file:
        for pair in _pairs(data):
            for i in pair:
                file.write(data[i].view(np.uint16))
            os.fsync(file.fileno())
            yield


def _pairs(data: Sequence[np.ndarray]) -> Iterator[range]:
    for start in range(0, len(data), _WRITERS):
        yield range(start, min(start + _WRITERS, len(data)))


def _read_plain(path: pathlib.Path, starts: Sequence[int], length: int) -> Iterator[None]:
    with path.open("rb", buffering=0) as file:
        for start in starts:
            file.seek(start)
            file.readinto(np.empty(length, np.uint8))  # as who keeps the rows would
    yield


def _drain(parts: Iterator[object]) -> None:
    for _ in parts:
        pass


def _touch_memory(n_bytes: int) -> None:
    """Uses memory and gives it back, so that no side pays for pages that were never there.

    A virtual machine may get its pages from the host when they are first touched, at several
    times the cost of writing a file into pages that it has.
    """
    with mmap.mmap(-1, n_bytes) as memory:
        for start in range(0, n_bytes, mmap.PAGESIZE):
            memory[start] = 1


def _forget(path: pathlib.Path) -> None:
    """Drops a file from the system's cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Prints each figure as a line of JSON; 1 with --check if one is not what it should be."""
    parser = argparse.ArgumentParser(prog="python -m saejax.store_bench", description=__doc__)
    parser.add_argument("--folder", help="where to write; a local disk (default: temporary files)")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--contexts", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--only", help="stop after this many figures", type=int)
    parser.add_argument("--check", action="store_true", help="exit status 1 if a target is missed")
    given = parser.parse_args(argv)
    allocator.keep_freed_memory()  # as `saejax.main` does
    folder = pathlib.Path(tempfile.mkdtemp(prefix="store-bench-", dir=given.folder))
    met = True
    try:
        figures = measure(folder, given.shards, given.contexts, given.repetitions)
        for figure in itertools.islice(figures, given.only):
            print(json.dumps(figure), flush=True)
            met = met and figure["met"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if met or not given.check else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
