"""The training loop: the order of events, sums of a window, and a stop at numbers that are none."""

import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.data.arrays import ArraySource
from saejax.data.feed import Feed
from saejax.mesh import MeshShape
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train import guard, hooks, loop
from saejax.train import state as state_lib
from saejax.train.loop import TrainConfig, Watch, run_steps
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.step import jit_step, make_step
from saejax.types import StepMetrics, TrainState
from saejax.wishes import AgreedWish

LATENTS, BATCH = 10, 4


def metrics(**changes) -> StepMetrics:
    values = {
        "tokens": BATCH, "squared_error": 2.0, "multi_squared_error": 0.0, "active": 8,
        "dead": 1, "auxk": 0.5, "auxk_skipped": 0, "at_capacity": 0, "multi_at_capacity": 0,
        "auxk_at_capacity": 0, "reselected": 0, "token_shard_pairs": BATCH, "grad_norm": 1.0,
        "learning_rate": 0.1, "skipped": 0, "skipped_in_a_row": 0,
    } | changes  # fmt: skip
    real = {"squared_error", "multi_squared_error", "auxk", "grad_norm", "learning_rate"}
    whole = set(values) - real
    return StepMetrics(
        **{k: jnp.asarray(v, jnp.int32 if k in whole else jnp.float32) for k, v in values.items()}
    )


def state(step: int = 0) -> TrainState:
    return TrainState(
        step=jnp.int32(step),
        params={},
        opt_state=(),
        ema=None,
        tokens_since_fired=jnp.zeros(LATENTS, jnp.int32),
        variance=jnp.float32(0.5),
        guard=guard.fresh(),
    )


class Recorder:
    """A step and a watch that write down what the loop does with them."""

    def __init__(self, steps=7, save_every=3, log_every=2, stop_at=None, bad=None):
        self.events, self.records, self.placed = [], [], []
        self.config = TrainConfig(tokens=steps * BATCH, batch_size=BATCH, log_every=log_every)
        self.bad, self.params = bad or {}, {}
        self.stop_at = stop_at
        self.watch = Watch(
            save=lambda s, window: self.events.append(f"save {int(s.step)}"),
            save_due=lambda done: done % save_every == 0,
            write=self.write,
            stop_requested=self.asked,
        )

    def step(self, before: TrainState, rows: jax.Array):
        done = int(before.step) + 1
        assert rows.shape == (BATCH, 3) and rows[0, 0] == done, "each step gets its own batch"
        self.events.append(f"step {done}")
        after = dataclasses.replace(before, step=jnp.int32(done), params=self.params)
        return after, metrics(**self.bad.get(done, {}))

    def asked(self) -> bool:
        return self.events[-1] == f"step {self.stop_at}"

    def write(self, record):
        self.events.append(f"write {int(record['step'])}")
        self.records.append(record)

    def run(self, first=0, available=100) -> TrainState:
        rows = (np.full((BATCH, 3), i + 1, np.float32) for i in range(first, available))
        return run_steps(self.step, state(first), rows, self.place, self.config, self.watch)

    def place(self, rows) -> jax.Array:
        self.placed.append(self.events[-1] if self.events else "start")
        return jax.device_put(rows)


# --- The order of events --------------------------------------------------------------------------


def test_records_and_checkpoints_come_when_they_are_due():
    loop = Recorder()
    assert int(loop.run().step) == 7
    assert loop.events == [
        "step 1", "step 2", "write 2", "step 3", "save 3", "step 4", "write 4", "step 5",
        "step 6", "write 6", "save 6", "step 7", "write 7", "save 7",
    ]  # fmt: skip
    assert [r["tokens"] for r in loop.records] == [2 * BATCH, 4 * BATCH, 6 * BATCH, 7 * BATCH]


def test_the_next_batch_is_on_its_way_while_a_step_runs():
    loop = Recorder()
    loop.run(available=7)  # and none is read that no step needs
    assert loop.placed == ["start", *(f"step {done}" for done in range(1, 7))]


def test_a_resumed_run_goes_on_where_it_was():
    loop = Recorder()
    assert int(loop.run(first=5).step) == 7
    assert loop.events == ["step 6", "write 6", "save 6", "step 7", "write 7", "save 7"]
    assert loop.records[0]["tokens"] == 6 * BATCH


def test_a_finished_run_does_nothing():
    loop = Recorder()
    assert int(loop.run(first=7).step) == 7
    assert loop.events == []


def test_a_stop_finishes_the_step_and_saves():
    loop = Recorder(stop_at=4, log_every=100, save_every=100)
    assert int(loop.run().step) == 4
    assert loop.events[-2:] == ["step 4", "save 4"], "a record only where an unstopped run has one"


def test_data_that_end_too_soon_are_an_error():
    loop = Recorder()
    with pytest.raises(ValueError, match=r"ended after step 3 of 7; .* lower Train\.tokens"):
        loop.run(available=3)
    assert "save 7" not in loop.events


def skipped(*steps: int, **numbers) -> dict[int, dict]:
    """Metrics of neighbouring steps that the guard left out."""
    counts = {"skipped": 1} | ({"squared_error": math.nan} | numbers)
    return {s: counts | {"skipped_in_a_row": i} for i, s in enumerate(steps, 1)}


def done(loop: Recorder, what: str) -> list[int]:
    return [int(event.split()[1]) for event in loop.events if event.startswith(what)]


@pytest.mark.parametrize("steps", [(3,), (2, 3), (3, 4), (4,)])
def test_a_save_that_is_due_among_skipped_steps_follows_them(steps):
    loop = Recorder(bad=skipped(*steps))
    loop.run()
    first = 3 if 3 not in steps else steps[-1] + 1
    assert done(loop, "save") == [first, 6, 7]


@pytest.mark.parametrize("stop_at", [None, 5])
def test_the_last_state_is_saved_even_if_its_step_was_skipped(stop_at):
    last = stop_at or 7
    loop = Recorder(bad=skipped(last - 1, last), stop_at=stop_at)
    assert int(loop.run().step) == last
    assert done(loop, "save")[-1] == last


def test_bad_weights_are_not_saved():
    loop = Recorder(bad=skipped(7))
    loop.params = {"w": jnp.asarray([1.0, math.nan])}
    with pytest.raises(hooks.DivergedError, match=r"steps 7 to 7 were skipped .batches 6 to 6;"):
        loop.run()
    assert done(loop, "save") == []


def test_weights_that_an_accepted_step_spoiled_are_not_saved():
    loop = Recorder(bad=skipped(4, 5, 6, 7))
    loop.params = {"w": jnp.asarray([math.inf])}
    loop.watch = dataclasses.replace(loop.watch, rollback_after=4)
    with pytest.raises(hooks.DivergedError, match="steps 4 to 7"):
        loop.run()
    assert done(loop, "save") == []


def test_so_many_skipped_steps_in_a_row_end_the_loop(caplog):
    bad = skipped(2) | skipped(5, 6, 7, 8, grad_norm=9.0)
    loop = Recorder(steps=20, save_every=99, log_every=99, bad=bad)
    loop.watch = dataclasses.replace(loop.watch, rollback_after=3)
    with pytest.raises(hooks.DivergedError) as caught:
        loop.run()
    assert (caught.value.first, caught.value.last) == (5, 7) and not caught.value.finite
    assert done(loop, "step")[-1] == 8, "found while the next step is running"
    assert caplog.messages[0] == (
        "step 2 (batch 1) skipped, its loss or gradient being not finite: loss = nan, gradient "
        "norm = 1; 1 in a row"
    )
    assert caplog.messages[-1].endswith("gradient norm = 9; 3 in a row")


def test_skipped_steps_are_counted_and_in_no_sum():
    loop = Recorder(steps=8, bad=skipped(2, 3, 4) | skipped(5, squared_error=9.0))
    loop.run()
    assert done(loop, "write") == [2, 6, 8], "a window of skipped steps alone goes on"
    assert [r["skipped"] for r in loop.records] == [1, 3, 0]
    assert [r["skipped_in_a_row"] for r in loop.records] == [1, 0, 0]
    assert {r["nmse"] for r in loop.records} == {2.0 / (BATCH * 0.5)}


# --- Nothing but steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_the_loop_compiles_once_and_transfers_batches_and_metrics_only(shape):
    """Batches in and metrics out are explicit; whatever else moved would be implicit, and raise."""
    mesh = mesh_lib.make_mesh(MeshShape(*shape))
    sae, optimizer = SAEConfig(d_model=16, n_latents=64, k=4), OptimizerConfig()
    config = TrainConfig(tokens=6 * 64, batch_size=64, log_every=2)
    rows = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
    create = functools.partial(state_lib.create, 0, sae, optimizer, 6, rows, mesh)
    step = make_step(
        sae, LossConfig(dead_tokens=64), optimizer, TopKConfig(), Normalizer(kind="none"), mesh,
        batch_tokens=64, chunks=1, steps=6,
    )  # fmt: skip
    step_fn = jit_step(step, create(), mesh)
    source, feed = ArraySource(rows, 64), Feed(mesh_lib.token_sharding(mesh), 64)
    stop = AgreedWish(lambda: 0, mesh)
    watch = Watch(
        save=lambda s, window: None,
        save_due=lambda done: False,
        write=lambda r: None,
        stop_requested=lambda: stop() == 2,
    )

    run_steps(step_fn, create(), source.iterate(0), feed.place, config, watch)  # compiles
    state, compiled = create(), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        with jax.transfer_guard("disallow"):
            final = run_steps(step_fn, state, source.iterate(0), feed.place, config, watch)
    finally:
        jax.monitoring.clear_event_listeners()
    assert int(final.step) == 6
    assert step_fn._cache_size() == 1 and compiled == []


# --- Windows --------------------------------------------------------------------------------------


def test_a_window_divides_sums_once():
    window = hooks.Window(variance=0.5)
    window.add(1, metrics(squared_error=3.0, tokens=10, active=40, dead=1, auxk=1.0))
    window.add(
        2,
        metrics(
            squared_error=7.0, multi_squared_error=5.0, tokens=30, active=60, dead=3, auxk=2.0,
            auxk_skipped=1, at_capacity=10, auxk_at_capacity=5, token_shard_pairs=16,
            reselected=2, grad_norm=9.0, learning_rate=0.25,
        ),
    )  # fmt: skip
    window.wait(1.5)
    record = window.close(2, LATENTS, 40)
    rate, share = record.pop("tokens_per_second"), record.pop("wait_share")
    assert rate > 0 and share == pytest.approx(1.5 * rate / 40)
    assert record == {
        "step": 2, "tokens": 40, "nmse": 10 / (40 * 0.5), "multi_nmse": 5 / (40 * 0.5),
        "l0": 100 / 40, "dead_fraction": 3 / LATENTS, "auxk": 1.5, "auxk_skipped": 1,
        "at_capacity": 10 / 20, "multi_at_capacity": 0, "auxk_at_capacity": 5 / 20,
        "reselected": 2 / 20, "grad_norm": 9.0, "learning_rate": 0.25, "skipped": 0,
        "skipped_in_a_row": 0,
    }  # fmt: skip
    assert all(type(value) is float for value in record.values())
    json.dumps(record)


def test_a_window_starts_anew():
    window = hooks.Window(1.0)
    window.add(1, metrics(squared_error=100.0))
    window.close(1, LATENTS, BATCH)
    with pytest.raises(ValueError, match="no step to report at step 1"):
        window.close(1, LATENTS, BATCH)
    window.add(2, metrics(squared_error=2.0))
    assert window.close(2, LATENTS, 2 * BATCH)["nmse"] == 0.5


def test_sums_do_not_lose_what_float32_would():
    window = hooks.Window(1.0)
    for step, value in enumerate([2.0**25, *[1.0] * 100], 1):
        window.add(step, metrics(squared_error=value, tokens=1, active=2**30))
    record = window.close(101, LATENTS, 101)
    assert record["nmse"] == (2**25 + 100) / 101
    assert record["l0"] == 2**30, "counts do not overflow their int32"


# --- Configuration --------------------------------------------------------------------------------


def test_whole_batches_only():
    assert TrainConfig(tokens=1999, batch_size=100).steps == 19
    assert TrainConfig(tokens=100, batch_size=100).steps == 1


def test_microbatches_divide_a_rows_share_and_split_over_its_devices():
    config = TrainConfig(tokens=1024, batch_size=512, microbatch_size=64)
    shapes = [MeshShape(1, 1), MeshShape(2, 1), MeshShape(8, 1), MeshShape(1, 64)]
    assert [config.chunks(shape) for shape in shapes] == [8, 4, 1, 8]
    assert TrainConfig(tokens=1024, batch_size=512).chunks(MeshShape(4, 2)) == 1
    for size, data, latent, fits in (
        (96, 1, 1, 64), (96, 16, 1, 32), (1024, 1, 1, 512), (3, 1, 1, 2), (64, 1, 128, 128),
        (24, 2, 8, 16),
    ):  # fmt: skip
        config = dataclasses.replace(config, microbatch_size=size)
        message = rf"microbatch_size = {size} must divide .* = {512 // data} and .*; {fits} does"
        with pytest.raises(ValueError, match=message):
            config.chunks(MeshShape(data, latent))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 99}, "tokens = 99 is less than one batch of batch_size = 100; train on more"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"sample_rows": 0}, "sample_rows = 0 must be at least 1"),
        ({"log_every": -1}, "log_every = -1 must be at least 1"),
        ({"microbatch_size": 0}, "microbatch_size = 0 must be at least 1, or None"),
    ],
)
def test_wrong_values_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"tokens": 1000, "batch_size": 100} | changes)


# --- What is written ------------------------------------------------------------------------------


def test_the_progress_line(caplog):
    caplog.set_level(logging.INFO, "saejax")
    record = {"step": 50.0, "nmse": 0.12345, "l0": 15.96, "dead_fraction": 0.0123}
    hooks.log_progress(record | {"tokens_per_second": 12345.6}, 200, 3725)
    assert caplog.messages == [
        "step 50/200  NMSE 0.1235  L0 16.0  dead 1.23 %  12,346 tokens/s  ETA 1h02m"
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (9e4, "25h00m")],
)
def test_durations(seconds, text):
    assert hooks.format_seconds(seconds) == text


def test_metrics_are_appended_and_later_ones_dropped_on_resume(tmp_path):
    assert hooks.read_metrics(tmp_path / "metrics.jsonl") == []
    writer = hooks.MetricsWriter(tmp_path)
    records = [{"step": float(step), "tokens": 1.0, "nmse": 1 / step} for step in (10, 20, 30)]
    for record in records:
        writer.write(record)
    writer.close()
    assert hooks.read_metrics(tmp_path / "metrics.jsonl") == records
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "nm')  # the process died here
    assert hooks.read_metrics(tmp_path / "metrics.jsonl") == records
    hooks.MetricsWriter(tmp_path, resume_step=20).close()
    assert hooks.read_metrics(tmp_path / "metrics.jsonl") == records[:2]
    assert not list(tmp_path.glob("*.partial"))


def test_a_disk_that_is_full_is_named_at_once_and_nothing_waits(tmp_path):
    record = {"step": 10.0, "tokens": 1.0, "nmse": 0.5}
    writer = hooks.MetricsWriter(tmp_path)
    writer.write(record)
    with open("/dev/full", "wb") as full:  # an event file that grows no more
        (events,) = (tmp_path / "tensorboard").iterdir()
        handles = pathlib.Path("/proc/self/fd").iterdir()
        (handle,) = (int(h.name) for h in handles if h.exists() and h.samefile(events))
        kept = os.dup(handle)
        os.dup2(full.fileno(), handle)
    for _ in range(20):
        with pytest.raises(OSError, match=r"tensorboard cannot be written \(No space left on dev"):
            writer.write(record)
    os.dup2(kept, handle)
    os.close(kept)
    writer.close()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written \(No space .* continues"):
        writer.write(record)


def test_events_are_those_of_tensorboard(tmp_path):
    record = {"step": 10.0, "tokens": 640.0, "nmse": 0.25, "l0": 8.0}
    writer = hooks.MetricsWriter(tmp_path, resume_step=5)
    writer.write(record)
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # a record: length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert path.name.startswith("events.out.tfevents.")
    assert events[0].file_version == "brain.Event:2"
    assert events[1].step == 6 and events[1].session_log.status == 1
    scalars = {e.summary.value[0].tag: e.summary.value[0].simple_value for e in events[2:]}
    assert scalars == {"train/nmse": 0.25, "train/l0": 8.0}
    assert {e.step for e in events[2:]} == {10}


def test_the_time_that_batches_take_to_come_is_the_wait_share():
    window = hooks.Window(variance=1.0)

    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    assert list(loop._timed(slow(), window)) == [0, 1, 2]
    time.sleep(0.15)
    window.add(1, metrics(squared_error=1.0, tokens=1))
    share = window.close(1, LATENTS, 1)["wait_share"]
    assert 0.2 < share < 0.7
    window.add(2, metrics(squared_error=1.0, tokens=1))
    assert window.close(2, LATENTS, 1)["wait_share"] == 0  # a window of its own
