"""The training loop: the order of events, sums of a window, and a stop at numbers that are none."""

import dataclasses
import functools
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.data.arrays import ArraySource
from saejax.data.feed import Feed
from saejax.fit import AgreedStop
from saejax.mesh import MeshShape
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train import hooks
from saejax.train import state as state_lib
from saejax.train.loop import TrainConfig, Watch, run_steps
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.step import jit_step, make_step
from saejax.types import StepMetrics, TrainState

LATENTS, BATCH = 10, 4


def metrics(**changes) -> StepMetrics:
    values = {
        "tokens": BATCH, "squared_error": 2.0, "multi_squared_error": 0.0, "active": 8,
        "dead": 1, "auxk": 0.5, "auxk_skipped": 0, "at_capacity": 0, "multi_at_capacity": 0,
        "auxk_at_capacity": 0, "reselected": 0, "token_shard_pairs": BATCH, "grad_norm": 1.0,
        "learning_rate": 0.1,
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
    )


class Recorder:
    """A step and a watch that write down what the loop does with them."""

    def __init__(self, steps=7, save_every=3, log_every=2, stop_at=None, bad=None):
        self.events, self.records, self.placed = [], [], []
        self.config = TrainConfig(tokens=steps * BATCH, batch_size=BATCH, log_every=log_every)
        self.bad = bad or {}
        self.stop_at = stop_at
        self.watch = Watch(
            save=lambda s: self.events.append(f"save {int(s.step)}"),
            save_every=save_every,
            write=self.write,
            stop_requested=self.asked,
        )

    def step(self, before: TrainState, rows: jax.Array):
        done = int(before.step) + 1
        assert rows.shape == (BATCH, 3) and rows[0, 0] == done, "each step gets its own batch"
        self.events.append(f"step {done}")
        after = dataclasses.replace(before, step=jnp.int32(done))
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
    assert loop.events[-3:] == ["step 4", "write 4", "save 4"]


def test_data_that_end_too_soon_are_an_error():
    loop = Recorder()
    with pytest.raises(ValueError, match=r"ended after step 3 of 7; .* lower Train\.tokens"):
        loop.run(available=3)
    assert "save 7" not in loop.events


@pytest.mark.parametrize("name", ["squared_error", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_state_is_saved_only_if_its_own_numbers_are_finite(name, value, step):
    loop = Recorder(bad={step: {name: value}})
    with pytest.raises(FloatingPointError, match=f"{name} = {value} at step {step} must be finite"):
        loop.run()
    saved = [int(event.split()[1]) for event in loop.events if event.startswith("save")]
    assert saved == [s for s in (3, 6, 7) if s < step]
    written = [int(event.split()[1]) for event in loop.events if event.startswith("write")]
    assert max(written, default=0) < step
    # found while the next step is running, not a whole window later
    assert f"step {step + 2}" not in loop.events


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
    stop = AgreedStop(lambda: False, mesh)
    watch = Watch(save=lambda s: None, save_every=9, write=lambda r: None, stop_requested=stop)

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
    record = window.close(2, LATENTS, 40)
    assert record.pop("tokens_per_second") > 0
    assert record == {
        "step": 2, "tokens": 40, "nmse": 10 / (40 * 0.5), "multi_nmse": 5 / (40 * 0.5),
        "l0": 100 / 40, "dead_fraction": 3 / LATENTS, "auxk": 1.5, "auxk_skipped": 1,
        "at_capacity": 10 / 20, "multi_at_capacity": 0, "auxk_at_capacity": 5 / 20,
        "reselected": 2 / 20, "grad_norm": 9.0, "learning_rate": 0.25,
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
