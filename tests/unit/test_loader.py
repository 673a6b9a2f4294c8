"""Batches are a pure function of (seed, step), hold every row once an epoch, and resume exactly."""

import ml_dtypes
import numpy as np
import pytest

from saejax.data.loader import Loader, LoaderConfig, chunk_order
from saejax.data.shards import CorruptStoreError, StoreSpec, open_store

N_SHARDS, CONTEXTS, ROWS = 6, 16, 5
SPEC = StoreSpec(
    subject="tiny",
    subject_fingerprint="aa",
    text_fingerprint="bb",
    split="train",
    site="final",
    d_model=3,
    context_length=ROWS + 1,
    contexts_per_shard=CONTEXTS,
    n_shards=N_SHARDS,
)
TOTAL = N_SHARDS * CONTEXTS * ROWS


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Row (shard, slot, position) holds these three numbers, which bfloat16 represents exactly."""
    return make(tmp_path_factory.mktemp("store") / "train")


def make(path, spec=SPEC):
    store = open_store(path, spec, "w")
    slots, positions = np.meshgrid(np.arange(CONTEXTS), np.arange(1, ROWS + 1), indexing="ij")
    for shard in range(spec.n_shards):
        acts = np.stack([np.full_like(slots, shard), slots, positions], -1).astype(np.float32)
        ids = shard * CONTEXTS + np.arange(CONTEXTS)
        tokens = np.zeros((CONTEXTS, ROWS + 1), np.uint16)
        store.write_shard(shard, acts, tokens=tokens, context=ids, document=ids + 1000, offset=ids)
    store.finish()
    return store


def loader(store, batch_size, prefetch=2, seed=0):
    return Loader(store, batch_size, LoaderConfig(seed=seed, prefetch=prefetch))


SIZES = (1, 4, 8, 16, 32, 48, 80, 96, 160)


@pytest.mark.parametrize("size", SIZES)
def test_every_row_occurs_once_an_epoch(store, size):
    one_epoch = np.concatenate([loader(store, size).batch(i) for i in range(-(-TOTAL // size))])
    assert one_epoch.dtype == ml_dtypes.bfloat16
    rows = one_epoch[:TOTAL].astype(np.int64)
    assert len(np.unique(rows, axis=0)) == TOTAL
    epochs = [loader(store, size).batch(i) for i in range(3 * TOTAL // size)]
    if 3 * TOTAL % size == 0:
        _, counts = np.unique(np.concatenate(epochs).astype(int), axis=0, return_counts=True)
        assert (counts == 3).all()


@pytest.mark.parametrize("size", SIZES)
def test_provenance_names_the_row(store, size):
    batches = loader(store, size)
    for step in range(TOTAL // size + 2):
        where = batches.provenance(step)
        np.testing.assert_array_equal(where, batches.batch(step).astype(np.int64))


@pytest.mark.parametrize("size", [4, 48])
def test_a_state_gives_rows_their_provenance_and_the_next_state(store, size):
    batches, state, tables = (
        loader(store, size),
        0,
        [store.read_contexts(i) for i in range(N_SHARDS)],
    )
    for step in range(TOTAL // size + 2):  # into the second epoch
        rows, where, state = batches.next(state)
        assert state == step + 1
        np.testing.assert_array_equal(rows, batches.batch(step))
        shard, context, position = batches.provenance(step).T
        table = np.array([tables[s][c, :2] for s, c in zip(shard, context, strict=True)])
        np.testing.assert_array_equal(where, (table[:, 0], table[:, 1], position))
    part, some, _ = batches.next(2, [(1, 3)])
    np.testing.assert_array_equal(part, batches.batch(2)[1:3])
    np.testing.assert_array_equal(some, [field[1:3] for field in batches.next(2)[1]])


@pytest.mark.parametrize("size", [4, 16, 48])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_resuming_anywhere_gives_the_same_rest(store, size, prefetch):
    n = TOTAL // size + 3  # into the second epoch
    whole = [loader(store, size).batch(step) for step in range(n)]
    for start in range(0, n, 1 if size > 4 else 7):
        rest = list(loader(store, size, prefetch).iterate(start, n))
        assert len(rest) == n - start
        for a, b in zip(whole[start:], rest, strict=True):
            np.testing.assert_array_equal(a, b)
    backwards = loader(store, size, prefetch)
    for step in reversed(range(n)):
        np.testing.assert_array_equal(backwards.batch(step), whole[step])


def test_epochs_and_seeds_differ(store):
    n = TOTAL // 16
    order = [loader(store, 16).batch(i)[0].astype(int).tolist() for i in range(2 * n)]
    other = [loader(store, 16, seed=1).batch(i)[0].astype(int).tolist() for i in range(n)]
    assert order[:n] != order[n:] and order[:n] != other


@pytest.mark.parametrize("size", [16, 32, 48, 80, 96])
def test_a_batch_has_no_two_rows_of_a_context(store, size):
    batches = loader(store, size)
    for step in range(TOTAL // size):
        where = batches.provenance(step)
        assert len(np.unique(where[:, :2], axis=0)) == size


def test_chunk_order_spreads_what_cannot_be_distinct():
    order = chunk_order([8] * 3, 7, seed=0, epoch=0)
    for batch in range(24 // 7):
        _, counts = np.unique(order[batch * 7 : batch * 7 + 7, 0], return_counts=True)
        assert counts.max() <= 4 and counts.min() >= 1
    assert len(np.unique(order, axis=0)) == 24


def test_chunk_order_is_what_checkpoints_resume_into():
    """A change here would give a resumed run other batches than the interrupted one."""
    assert chunk_order([2] * 3, 2, seed=4, epoch=1).tolist() == [
        [0, 1],
        [1, 0],
        [2, 1],
        [0, 0],
        [2, 0],
        [1, 1],
    ]


RANGES = [((0, 8),), ((8, 16),), ((0, 3), (5, 6), (9, 16)), ((0, 1), (15, 16)), ((4, 12),)]


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("size", [16, 32, 48, 96])
def test_a_process_gets_its_rows_of_the_global_batch(store, size, ranges):
    ranges = tuple((a * size // 16, b * size // 16) for a, b in ranges)
    rows = np.concatenate([np.arange(a, b) for a, b in ranges])
    batches = loader(store, size)
    parts = list(batches.iterate(2, 2 + TOTAL // size, ranges))
    for step, part in enumerate(parts, 2):
        whole = loader(store, size).batch(step)
        np.testing.assert_array_equal(part, whole[rows])
        np.testing.assert_array_equal(batches.batch(step, ranges), whole[rows])
        np.testing.assert_array_equal(batches.provenance(step, ranges), part.astype(np.int64))


def test_only_the_chunks_with_rows_of_a_process_are_read(store, monkeypatch):
    read = []
    real = type(store).read_chunk
    monkeypatch.setattr(
        type(store), "read_chunk", lambda s, *chunk: read.append(chunk) or real(s, *chunk)
    )
    loader(store, 4 * CONTEXTS).batch(0, ((CONTEXTS, 2 * CONTEXTS),))
    assert len(read) == 1
    read.clear()
    # Three ranges of two chunks: each chunk is read once.
    loader(store, 4 * CONTEXTS).batch(0, ((0, 2), (4, 6), (CONTEXTS - 1, CONTEXTS + 1)))
    assert len(read) == len(set(read)) == 2


@pytest.mark.parametrize(
    "ranges", [(), ((0, 17),), ((-1, 4),), ((4, 4),), ((8, 12), (0, 4)), ((0, 8), (4, 12))]
)
def test_ranges_that_are_no_rows_of_a_batch_are_refused(store, ranges):
    with pytest.raises(ValueError, match=r"ranges = .* must be ascending, disjoint .* of 16"):
        loader(store, 16).batch(0, ranges)


def test_sample_is_the_start_of_the_stream(store):
    batches = loader(store, 32)
    stream = np.concatenate([batches.batch(i) for i in range(3)])
    np.testing.assert_array_equal(batches.sample_rows(70), stream[:70])
    assert len(batches.sample_rows(TOTAL)) == TOTAL == batches.tokens_per_epoch
    with pytest.raises(ValueError, match=f"has {TOTAL}"):
        batches.sample_rows(TOTAL + 1)


def test_wrong_sizes_are_refused_with_the_allowed_ones(store):
    with pytest.raises(ValueError, match=r"batch_size = 24.*multiple of 16.*\[1, 2, 4, 8\]"):
        Loader(store, 24)
    with pytest.raises(ValueError, match="step = -1"):
        Loader(store, 16).batch(-1)
    with pytest.raises(ValueError, match="prefetch"):
        LoaderConfig(prefetch=-1)


def test_unfinished_and_damaged_stores_are_refused(tmp_path):
    make(tmp_path / "train")
    make(tmp_path / "held_out")
    train, held_out = (open_store(tmp_path / split) for split in ("train", "held_out"))
    (tmp_path / "train" / "acts" / "c" / "4" / "0").unlink()
    with pytest.raises(FileNotFoundError, match=r"acts/c/4/0 \(shard 4, chunk"):
        list(Loader(train, 16).iterate(0, TOTAL // 16))
    damaged = tmp_path / "held_out" / "acts" / "c" / "2" / "0"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(CorruptStoreError, match=r"acts/c/2/0 \(shard 2, chunk"):
        list(Loader(held_out, 4).iterate(0, TOTAL // 4))
    (tmp_path / "train" / "commits" / "000003.json").unlink()
    with pytest.raises(ValueError, match="1 of 6 shards have no commit record"):
        Loader(train, 16)
