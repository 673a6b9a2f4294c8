"""What is masked is not stored, everything else is, and each row still knows where it is from."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from saejax.data.layout import (
    LEFT_OUT,
    MASKED,
    StoreSpec,
    chunk_places,
    pack_mask,
    position_order,
    unpack_mask,
)
from saejax.data.loader import Loader, LoaderConfig, chunk_order
from saejax.data.shards import open_store
from saejax.sources import contexts_of, tokens_of

CONTEXTS, LENGTH, WIDTH = 16, 9, 4
SPEC = StoreSpec(
    subject="tiny",
    subject_fingerprint="aa",
    text_fingerprint="bb",
    split="train",
    site="final",
    d_model=WIDTH,
    context_length=LENGTH,
    contexts_per_shard=CONTEXTS,
    n_shards=5,
    max_norm_ratio=4.0,
)
ROWS = SPEC.rows_per_context
LOUD = {(1, 3, 5), (1, 4, 8), (3, 0, 1)}  # (shard, context, position) with an outlying norm


def codes(shard):
    """Padding at the end of some contexts, BOS and special tokens here and there."""
    rng = np.random.default_rng([3, shard])
    masked = np.zeros((CONTEXTS, LENGTH), np.uint8)
    masked[:, 0] = MASKED.index("bos")
    masked[rng.random(masked.shape) < 0.05] = MASKED.index("special")
    length = rng.integers(2, LENGTH + 1, CONTEXTS)
    masked[np.arange(LENGTH) >= length[:, None]] = MASKED.index("padding")
    if shard == 2:
        masked[:] = MASKED.index("padding")  # nothing is left of this one
    if shard == 4:
        masked[:] = 0  # and of this one everything
    for _, context, position in (place for place in LOUD if place[0] == shard):
        masked[context, position] = 0
    return masked


def acts(shard):
    """Row (shard, context, position) holds these numbers; bfloat16 represents them exactly."""
    shape = (CONTEXTS, ROWS)
    context, row = np.indices(shape)
    rows = np.stack([np.full(shape, shard), context, row + 1, np.full(shape, 40)], -1)
    rows = rows.astype(np.float32)
    for _, c, position in (place for place in LOUD if place[0] == shard):
        rows[c, position - 1, 3] = 4000
    rows[codes(shard)[:, 1:] > 0] = np.nan  # whatever a model makes of padding
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = open_store(tmp_path_factory.mktemp("masks") / "train", SPEC, "w")
    for shard in range(SPEC.n_shards):
        ids = shard * CONTEXTS + np.arange(CONTEXTS)
        tokens = np.arange(CONTEXTS * LENGTH).reshape(CONTEXTS, LENGTH)
        where = {"tokens": tokens, "context": ids, "document": ids % 3, "offset": ids * LENGTH}
        store.write_shard(shard, acts(shard), masked=codes(shard), **where)
    store.write_documents(["a", "b", "c"])
    store.finish()
    return store


def expected_rows(shard):
    """{(context, position)} that the masks and the norms leave."""
    kept = codes(shard) == 0
    kept[:, 0] = False
    found = {(int(c), int(p)) for c, p in np.argwhere(kept)}
    return found - {(c, p) for s, c, p in LOUD if s == shard}


def stored_rows(store, shard):
    rows = [
        store.read_chunk(shard, j).result().astype(int) for j in range(int(store.chunks[shard]))
    ]
    return np.concatenate(rows) if rows else np.empty((0, WIDTH), int)


def test_every_kept_row_is_stored_once_but_for_the_last_chunk(store):
    for shard in range(SPEC.n_shards):
        rows, wanted = stored_rows(store, shard), expected_rows(shard)
        assert (rows[:, 0] == shard).all() and (rows[:, 3] == 40).all()
        found = {(int(c), int(p)) for c, p in rows[:, 1:3]}
        assert len(found) == len(rows) == len(wanted) // CONTEXTS * CONTEXTS
        assert found <= wanted
        record = store.record(shard)
        left_out = record["left_out"]
        assert tuple(left_out) == LEFT_OUT or set(left_out) == set(LEFT_OUT)
        assert left_out["last_chunk"] == len(wanted) % CONTEXTS
        assert left_out["norm"] == sum(place[0] == shard for place in LOUD)
        inner = codes(shard)[:, 1:]
        for code, reason in enumerate(MASKED[1:], 1):
            assert left_out[reason] == (inner == code).sum()
        assert record["rows"] + sum(left_out.values()) == CONTEXTS * LENGTH
    assert store.chunks[2] == 0 and store.chunks[4] == ROWS
    store.verify()


def test_provenance_names_every_row(store):
    for shard in range(SPEC.n_shards):
        for chunk in range(int(store.chunks[shard])):
            rows = store.read_chunk(shard, chunk).result().astype(int)
            np.testing.assert_array_equal(np.stack(store.where(shard, chunk), 1), rows[:, 1:3])


def test_nothing_masked_is_one_row_of_each_context_a_chunk(store):
    order = position_order(0, 4, CONTEXTS, ROWS)
    for chunk in range(ROWS):
        context, position = store.where(4, chunk)
        np.testing.assert_array_equal(context, np.arange(CONTEXTS))
        np.testing.assert_array_equal(position, order[:, chunk] + 1)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_chunks_repeat_few_contexts(share):
    rng = np.random.default_rng(0)
    kept = rng.random((256, 63)) > share
    kept[:100, 40:] = False  # padding
    order = position_order(0, 0, 256, 63)
    places = chunk_places(order, kept)
    assert len(np.unique(places)) == places.size == kept.sum() // 256 * 256
    assert kept.ravel()[places].all()
    count, context = kept.sum(1), places // 63
    own = context == np.arange(256)
    np.testing.assert_array_equal(own.sum(0) >= np.minimum(count, len(places)), True)
    longer = (count > len(places)).sum()
    for chunk, mine in zip(context, own):
        _, counts = np.unique(chunk, return_counts=True)
        assert counts.max() <= 2 + -(-(~mine).sum() // max(longer, 1))
    # No chunk is made of long contexts alone: the short ones come at equal distances.
    short = (context < 100).sum(1)
    assert short.max() - short.min() <= max(12, 6 * short.mean() ** 0.5)
    early = places[:4] % 63  # positions are drawn evenly from what is kept
    assert abs(early.mean() - (np.argwhere(kept)[:, 1]).mean()) < 4


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 127])
def test_masks_survive_packing(rows):
    mask = np.random.default_rng(rows).random((7, rows)) < 0.5
    packed = pack_mask(mask)
    assert packed.shape == (7, -(-rows // 32)) and packed.dtype == np.uint32
    np.testing.assert_array_equal(unpack_mask(packed, rows), mask)
    assert pack_mask(np.arange(40)[None] == 33).tolist() == [[0, 2]]


def test_readers_see_the_mask(store):
    blocks = list(contexts_of(store))
    for shard, (block, (tokens, mask)) in enumerate(zip(blocks, tokens_of(store), strict=True)):
        wanted = np.zeros((CONTEXTS, LENGTH), bool)
        for place in expected_rows(shard):
            wanted[place] = True
        np.testing.assert_array_equal(mask, wanted)
        np.testing.assert_array_equal(tokens, block.tokens)
        assert not (block.stored & ~wanted[:, 1:]).any()
        assert block.stored.sum() == store.record(shard)["rows"]
        assert not block.rows[~block.stored].astype(int).any()
        np.testing.assert_array_equal(
            block.rows[block.stored].astype(int)[:, 1:3],
            np.argwhere(block.stored) + np.array([0, 1]),
        )
        assert block.stored_rows().reshape(-1, WIDTH).shape[0] == store.record(shard)["rows"]


def test_the_manifest_counts_what_is_stored(store):
    manifest = store.manifest
    rows = np.concatenate([stored_rows(store, shard) for shard in range(SPEC.n_shards)])
    assert manifest["rows"] == store.n_rows == len(rows)
    assert manifest["chunks"] == store.chunks.tolist()
    np.testing.assert_allclose(manifest["mean"], rows.mean(0), rtol=1e-12)
    counts = np.bincount(rows[:, 2], minlength=LENGTH)[1:]
    assert manifest["count_by_position"] == counts.tolist()
    norms = np.linalg.norm(rows, axis=1)
    for position, norm in enumerate(manifest["norm_by_position"], 1):
        np.testing.assert_allclose(norm, norms[rows[:, 2] == position].mean(), rtol=1e-12)
    assert manifest["left_out"]["norm"] == len(LOUD)


def test_a_position_that_is_never_stored_has_no_norm(tmp_path):
    spec = dataclasses.replace(SPEC, n_shards=1)
    store = open_store(tmp_path, spec, "w")
    masked = np.zeros((CONTEXTS, LENGTH), np.uint8)
    masked[:, 3] = MASKED.index("special")
    ids = np.arange(CONTEXTS)
    where = {"tokens": np.zeros_like(masked), "context": ids, "document": ids, "offset": ids}
    store.write_shard(0, acts(4), masked=masked, **where)
    manifest = store.finish()
    assert manifest["norm_by_position"][2] is None and manifest["count_by_position"][2] == 0
    with pytest.raises(ValueError, match=r"mask of shard 0 has shape \(16, 8\)"):
        other = open_store(tmp_path / "other", spec, "w")
        other.write_shard(0, acts(4), masked=masked[:, 1:], **where)


def test_a_store_of_nothing_is_refused(tmp_path):
    store = open_store(tmp_path, dataclasses.replace(SPEC, n_shards=1), "w")
    ids, masked = np.arange(CONTEXTS), np.full((CONTEXTS, LENGTH), MASKED.index("padding"))
    where = {"tokens": masked, "context": ids, "document": ids, "offset": ids}
    store.write_shard(0, acts(4), masked=masked, **where)
    with pytest.raises(ValueError, match=r"nothing is left to store \(\{.*'padding': 128"):
        store.finish()


def test_norms_are_filtered_only_where_asked_and_where_there_is_a_median(tmp_path):
    rows, ids = acts(4), np.arange(CONTEXTS)
    rows[0, 0] = 300 * rows[0, 0]
    tokens = np.zeros((CONTEXTS, LENGTH), int)
    where = {"tokens": tokens, "context": ids, "document": ids, "offset": ids}
    silent = np.zeros_like(rows)
    silent[0, 0] = 1  # the median norm is zero
    for name, ratio, given, dropped in (
        ("on", 4.0, rows, 1), ("off", None, rows, 0), ("high", 1e4, rows, 0),
        ("silent", 4.0, silent, 0),
    ):  # fmt: skip
        spec = dataclasses.replace(SPEC, n_shards=1, max_norm_ratio=ratio)
        store = open_store(tmp_path / name, spec, "w")
        store.write_shard(0, given, **where)
        assert store.record(0)["left_out"]["norm"] == dropped
    with pytest.raises(ValueError, match="max_norm_ratio = 1"):
        dataclasses.replace(SPEC, max_norm_ratio=1.0)
    rows[0, 0] = np.inf  # no outlier but a fault
    with pytest.raises(ValueError, match="NaN or infinite"):
        open_store(tmp_path / "on2", spec, "w").write_shard(0, rows, **where)


# --- The loader over shards of different sizes ----------------------------------------------------


@pytest.mark.parametrize("size", [4, 16, 32, 48])
def test_an_epoch_holds_every_stored_row_once(store, size):
    batches = Loader(store, size, LoaderConfig(seed=1))
    n = store.n_rows
    assert batches.tokens_per_epoch == n
    steps = -(-2 * n // size)
    rows = np.concatenate([batches.batch(i) for i in range(steps)]).astype(int)
    for epoch in range(2):
        part = rows[epoch * n : (epoch + 1) * n]
        assert len(np.unique(part, axis=0)) == n
    for step in range(steps):
        np.testing.assert_array_equal(
            batches.provenance(step), batches.batch(step)[:, :3].astype(int)
        )
    resumed = list(Loader(store, size, LoaderConfig(seed=1)).iterate(steps - 3, steps))
    for step, batch in enumerate(resumed, steps - 3):
        np.testing.assert_array_equal(batch, batches.batch(step))


@pytest.mark.parametrize("per_batch", [1, 2, 7, 16])
def test_unequal_shards_are_spread_over_the_epoch(per_batch):
    rng = np.random.default_rng(2)
    chunks = rng.integers(30, 64, 24)
    chunks[5] = 0
    for epoch in range(2):
        order = chunk_order(chunks, per_batch, seed=3, epoch=epoch)
        assert len(np.unique(order, axis=0)) == len(order) == chunks.sum()
        assert (order[:, 1] < chunks[order[:, 0]]).all()
        halves = [np.bincount(half[:, 0], minlength=24) for half in np.array_split(order, 2)]
        assert np.abs(halves[0] - halves[1]).max() <= 14
        begun = -(epoch * chunks.sum()) % per_batch
        whole = order[begun : begun + (len(order) - begun) // per_batch * per_batch, 0]
        whole = np.sort(whole.reshape(-1, per_batch), axis=1)
        repeated = (whole[:, 1:] == whole[:, :-1]).any(axis=1).mean()
        assert repeated < (0.02 if per_batch < 16 else 0.35), repeated


def test_bfloat16_rows(store):
    assert next(Loader(store, 16).iterate()).dtype == ml_dtypes.bfloat16
