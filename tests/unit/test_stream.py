"""The stream against a plain swap buffer, and against itself after a restart."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import config
from saejax import mesh as mesh_lib
from saejax.data.layout import random_keys
from saejax.data.stream import Stream
from saejax.data.stream_plan import ROW_STREAM, StreamPlan, contexts_for, lanes_for
from saejax.data.tokens import Contexts
from saejax.subjects.request import HarvestConfig
from saejax.subjects.streaming import StreamConfig

T, D = 6, 3
SITES = {"a": D, "b": 2}


def contexts_of(n: int, seed: int = 0, masked: float = 0.2) -> Contexts:
    rng = np.random.default_rng(seed)
    keep = rng.random((n, T)) >= masked
    keep[:, 0] = False
    return Contexts(
        tokens=rng.integers(0, 50, (n, T)).astype(np.uint16),
        document=np.arange(n, dtype=np.int32) // 3,
        offset=np.zeros(n, np.int32),
        names=tuple(f"doc{i}" for i in range(-(-n // 3))),
        dropped_tokens=0,
        fingerprint="f",
        bytes_total=0,
        keep=keep,
        length=np.full(n, T, np.int32),
        lead=0,
        byte_start=np.zeros(n, np.int64),
        document_bytes=np.zeros(-(-n // 3), np.int64),
        document_sha256=np.zeros((-(-n // 3), 32), np.uint8),
        left_out={},
    )


def forward(params, tokens_NT):
    """Every row tells its token and position; bfloat16 holds them exactly."""
    token = tokens_NT.astype(jnp.float32)
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.float32), token.shape)
    base = jnp.stack([token * params, position, jnp.ones_like(token)], -1)
    return {"a": base, "b": base[..., :2]}


def make(contexts, *, lanes=2, batch=8, group=3, buffer=4, seed=1, ratio=None, devices=1):
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(1, devices), jax.devices()[:devices])
    plan = StreamPlan(
        n_contexts=len(contexts.tokens),
        kept=contexts.keep.sum(1),
        lanes=lanes,
        group_contexts=group,
        batch_size=batch,
        buffer_batches=buffer,
        seed=seed,
    )
    keep, params = contexts.keep, jnp.float32(1)
    return Stream(forward, params, contexts, plan, mesh, keep=keep, max_norm_ratio=ratio)


def taken(stream, first, n):
    """Batches as numpy: values, contexts and positions by step."""
    return [jax.device_get(batch) for batch in itertools.islice(stream.iterate(first), n)]


def plain(stream: Stream, steps: int):
    """The same by lists: (context, position) of every batch, one swap buffer for each lane."""
    plan, contexts = stream.plan, stream._contexts
    rows = [[] for _ in range(plan.lanes)]
    needed = plan.slots + steps * plan.rows_per_step
    number = 0
    while len(rows[0]) < needed:
        group = plan.group(number)
        keys = random_keys((plan.lanes, plan.group_contexts * T), plan.seed, ROW_STREAM, number)
        for lane in range(plan.lanes):
            ids = plan.contexts[group, lane]
            kept = [(keys[lane, c * T + t], ids[c], t) for c in range(len(ids)) for t in range(T)
                    if contexts.keep[ids[c], t]]  # fmt: skip
            rows[lane] += [(c, t) for _, c, t in sorted(kept)][: plan.rows_per_group]
        number += 1
    batches = []
    buffers = [lane[: plan.slots] for lane in rows]
    for step in range(steps):
        batch = []
        for lane, buffer in enumerate(buffers):
            for j, slot in enumerate(plan.slots_of(step)[lane]):
                batch.append(buffer[slot])
                buffer[slot] = rows[lane][plan.slots + step * plan.rows_per_step + j]
        batches.append(batch)
    return batches


@pytest.mark.parametrize("lanes, batch, group, buffer", [(1, 4, 2, 3), (2, 8, 3, 4), (4, 4, 5, 2)])
def test_the_stream_is_a_swap_buffer(lanes, batch, group, buffer):
    contexts = contexts_of(60)
    stream = make(contexts, lanes=lanes, batch=batch, group=group, buffer=buffer)
    steps = 3 * buffer + 1
    for got, wanted in zip(taken(stream, 0, steps), plain(stream, steps), strict=True):
        values, rows = got["a"]
        assert list(zip(rows.context.flat, rows.position.flat, strict=True)) == wanted
        token = [contexts.tokens[c, t] for c, t in wanted]
        np.testing.assert_array_equal(values[:, 0].astype(np.float32), token)
        np.testing.assert_array_equal(values[:, 1].astype(np.float32), [t for _, t in wanted])
        np.testing.assert_array_equal(got["b"][0], values[:, :2])


@pytest.mark.parametrize("at", [0, 1, 4, 7, 8, 13])
def test_a_restart_goes_on_with_the_same_bits(at):
    contexts = contexts_of(60)
    whole = taken(make(contexts), 0, at + 5)[at:]
    again = taken(make(contexts), at, 5)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


@pytest.mark.parametrize("devices", [2, 4])
def test_the_sequence_does_not_depend_on_the_devices(devices):
    contexts = contexts_of(90)
    one = taken(make(contexts, lanes=4, devices=1), 0, 9)
    several = taken(make(contexts, lanes=4, devices=devices), 0, 9)
    jax.tree.map(np.testing.assert_array_equal, one, several)


def test_a_batch_is_split_over_the_mesh():
    values, rows = next(make(contexts_of(60), lanes=4, devices=4).iterate())["a"]
    assert values.shape == (8, D) and rows.values.shape == (4, 2, D)
    assert len({shard.device for shard in values.addressable_shards}) == 4
    assert values.addressable_shards[0].data.shape == (2, D)


def test_an_epoch_gives_every_row_once():
    contexts = contexts_of(24, masked=0)
    stream = make(contexts, lanes=2, batch=4, group=3, buffer=1)
    plan = stream.plan
    assert (plan.n_groups, plan.rows_per_group, plan.rows_per_epoch) == (4, 15, 120)
    seen = [row for batch in plain(stream, 60) for row in batch]
    assert len(set(seen[:116])) == 116  # the buffer still holds the last four
    first, second = [plan.group(i) for i in range(4)], [plan.group(4 + i) for i in range(4)]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3]
    orders = {tuple(plan.group(4 * epoch + i) for i in range(4)) for epoch in range(8)}
    assert len(orders) > 1


def test_rows_that_one_epoch_leaves_out_come_in_another():
    contexts = contexts_of(24, masked=0.4)
    stream = make(contexts, lanes=2, batch=4, group=3, buffer=1)
    plan, usable = stream.plan, set(zip(*np.nonzero(contexts.keep), strict=True))
    assert plan.rows_per_epoch < len(usable)
    steps = 12 * plan.rows_per_epoch // 4
    seen = [row for batch in plain(stream, steps) for row in batch]
    assert set(seen) == usable
    got = taken(stream, steps - 1, 1)[0]["a"][1]
    assert list(zip(got.context.flat, got.position.flat, strict=True)) == seen[-4:]


def test_any_batch_can_be_asked_for():
    stream, whole = make(contexts_of(60)), taken(make(contexts_of(60)), 0, 9)
    passes, once = [], stream._harvested
    stream._harvested = lambda number: passes.append(number) or once(number)
    for step in (0, 0, 1, 2, 2, 7, 8, 3):
        before = len(passes)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(stream.at(step)), whole[step])
        if step in (1, 2, 8):
            assert len(passes) <= before + 1  # no buffer is filled anew
    where = stream.provenance(stream.at(3)["b"][1])
    np.testing.assert_array_equal(where.context, whole[3]["b"][1].context.reshape(-1))
    np.testing.assert_array_equal(where.document, where.context // 3)
    with pytest.raises(ValueError, match="step = -1: must be 0 or more"):
        stream.at(-1)
    stream._params = jnp.float32(np.nan)
    for _ in range(2):  # the second finds no generator that has ended
        with pytest.raises(ValueError, match="activations at site 'a' are NaN"):
            for step in range(20, 40):
                stream.at(step)


def test_masked_positions_never_come():
    contexts = contexts_of(60, masked=0.5)
    for batch in taken(make(contexts), 0, 30):
        rows = batch["a"][1]
        assert contexts.keep[rows.context, rows.position].all()


def test_outliers_are_replaced_and_counted():
    contexts = contexts_of(24, masked=0)
    contexts.tokens[:] = 1
    contexts.tokens[5, 2] = contexts.tokens[11, 4] = 40
    stream = make(contexts, lanes=1, batch=4, group=4, buffer=2, ratio=5.0)
    values = np.concatenate([b["a"][0] for b in taken(stream, 0, 28)]).astype(np.float32)
    assert values[:, 0].max() == 1 and len(values) == 112
    stream._check(wait=True)
    assert stream.outliers["a"] == 2
    kept = make(contexts, lanes=1, batch=4, group=4, buffer=2, ratio=None)
    values = np.concatenate([b["a"][0] for b in taken(kept, 0, 28)]).astype(np.float32)
    assert (values[:, 0] == 40).sum() == 2


def test_a_row_that_is_not_finite_is_refused():
    contexts = contexts_of(24)
    stream = make(contexts, buffer=2)
    stream._params = jnp.float32(np.nan)
    with pytest.raises(ValueError, match=r"activations at site 'a' are NaN .* doc\d"):
        taken(stream, 0, 10)


def test_samples_are_rows_of_the_stream():
    stream = make(contexts_of(60))
    rows = stream.sample_rows(50, "a")
    assert rows.shape == (50, D)
    with pytest.raises(ValueError, match="at most"):
        stream.sample_rows(10**6, "a")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lanes": 3}, "does not divide by Stream.lanes = 3"),
        ({"group_contexts": 100}, "fewer than one forward pass takes .* raise Harvest.tokens"),
        ({"buffer_batches": 0}, "Stream.buffer_batches = 0"),
    ],
)
def test_bad_plans_are_refused(change, words):
    plan = make(contexts_of(60)).plan
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(plan, **change)


def test_a_subject_on_the_host_is_refused_before_anything_is_stored():
    with pytest.raises(ValueError, match=r"Harvest.subject = 'torch:x' .* = @Harvest\(\)"):
        StreamConfig(harvest=HarvestConfig(subject="torch:x"))


def test_text_that_is_masked_throughout_is_refused():
    with pytest.raises(ValueError, match="keeps no row at all"):
        make(contexts_of(60, masked=1.0))


def test_a_bounded_epoch_is_drawn_from_all_of_the_text():
    kept = np.full(1000, 5)
    assert contexts_for(kept, None, 1) == 1000 == contexts_for(kept, 10**9, 1)
    some = contexts_for(kept, 496, 1)
    assert some == 100
    shape = {"lanes": 2, "group_contexts": 5, "batch_size": 4, "buffer_batches": 2, "seed": 1}
    contexts = StreamPlan(n_contexts=some, kept=kept, **shape).contexts
    assert contexts.size == 100 and 350 < contexts.mean() < 650 and contexts.max() > 900
    whole = StreamPlan(n_contexts=1000, kept=kept, **shape).contexts
    np.testing.assert_array_equal(whole.ravel()[:100], contexts.ravel())


def test_lanes_follow_the_devices():
    assert [lanes_for(devices, 64, None) for devices in (1, 2, 4, 8, 16)] == [8, 8, 8, 8, 16]
    assert lanes_for(3, 48, None) == 24 and lanes_for(4, 12, None) == 4
    assert lanes_for(8, 64, 16) == 16
    with pytest.raises(ValueError, match="does not divide by the 8 devices"):
        lanes_for(8, 60, None)


@pytest.mark.parametrize("name", ["streamed", "several"])
def test_shipped_streams_run_on_up_to_eight_devices(name):
    built = config.load_experiment([f"gin/{name}.gin"])[0]
    for devices in (1, 2, 4, 8):
        lanes = lanes_for(devices, built.train.batch_size, built.data.lanes)
        assert lanes % devices == 0 and built.train.batch_size % lanes == 0


def test_lanes_must_divide_by_the_devices():
    with pytest.raises(ValueError, match=r"Stream.lanes = 2 does not divide by the 4 devices"):
        make(contexts_of(60), lanes=2, devices=4)
