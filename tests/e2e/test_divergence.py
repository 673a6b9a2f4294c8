"""Batches that a step must not learn from: skipped, rolled back from, or told of."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from saejax.checkpoint import CheckpointConfig
from saejax.data.synthetic import Synthetic, SyntheticConfig
from saejax.fit import fit
from saejax.model.sae import SAEConfig
from saejax.recipe import Recipe
from saejax.train.guard import GuardConfig
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig

STEPS, BATCH = 24, 64
RECIPE = Recipe(
    sae=SAEConfig(d_model=16, n_latents=64, k=4, normalization="scalar"),
    train=TrainConfig(tokens=STEPS * BATCH, batch_size=BATCH, sample_rows=256, log_every=2),
    loss=LossConfig(dead_tokens=2 * BATCH),
    optimizer=OptimizerConfig(learning_rate=1e-2, ema_decay=0.9),
    checkpoint=CheckpointConfig(every_steps=5, keep=None),
    guard=GuardConfig(rollback_after=3, after_steps=4),
)
DATA = SyntheticConfig(features=64, d_model=16, mean_l0=3.0, held_out_rows=256)


class Faulty(Synthetic):
    """Synthetic batches of which some come wrong, so many times each."""

    def __init__(self, bad: dict[int, float], times: int = 10**9):
        super().__init__(DATA, BATCH)
        self.bad, self.left = bad, dict.fromkeys(bad, times)
        self.begun: list[int] = []

    def iterate(self, start_step: int = 0, ranges=None):
        self.begun.append(start_step)
        for step, rows in enumerate(super().iterate(start_step, ranges=ranges), start_step):
            if self.left.get(step, 0) > 0:
                self.left[step] -= 1
                rows = rows * np.float32(self.bad[step])
            yield rows


def run(folder: pathlib.Path, batches, stop_after: int | None = None, recipe=RECIPE):
    folder.mkdir(exist_ok=True)
    asked = iter(range(1, 1000))
    return fit(
        recipe,
        batches,
        identity={"data": "synthetic"},
        checkpoints=folder / "checkpoints",
        write_to=folder,
        stop_requested=lambda: next(asked) == stop_after,
    )


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_saved(folder) -> list[str]:
    return sorted((p.name for p in (folder / "checkpoints").iterdir()), key=lambda n: (len(n), n))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a.sae.params), jax.tree.leaves(b.sae.params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("factor", [np.nan, 1e6])
def test_a_bad_batch_is_skipped_counted_and_survived(tmp_path, factor, caplog):
    done = run(tmp_path / "run", Faulty({9: factor, 14: factor, 15: factor}))
    assert not done.stopped and np.isfinite(done.sae.params["w_enc"]).all()
    assert steps_saved(tmp_path / "run") == ["5", "11", "17", "20", "24"], "not among skipped steps"
    counted = {r["step"]: r["skipped"] for r in records(tmp_path / "run") if r["skipped"]}
    assert counted == {10: 1, 18: 2}, "a window of skipped steps alone goes on"
    kind = "not finite" if np.isnan(factor) else "a spike"
    told = [m for m in caplog.messages if "skipped" in m]
    assert len(told) == 3 and told[0].startswith("step 10 (batch 9) skipped, its loss or gradient")
    assert all(f"being {kind}" in m for m in told) and told[2].endswith("; 2 in a row")


@pytest.mark.parametrize(
    "stop_after", [15, *(pytest.param(n, marks=pytest.mark.slow) for n in (10, 16))]
)
def test_a_stop_at_a_skipped_step_changes_nothing(tmp_path, stop_after):
    bad = {9: np.nan, 14: np.nan, 15: np.nan}
    whole = run(tmp_path / "whole", Faulty(bad))
    assert run(tmp_path / "cut", Faulty(bad), stop_after).stopped
    assert_same(whole, run(tmp_path / "cut", Faulty(bad)))
    times = ("tokens_per_second", "wait_share")
    one, other = (
        [{k: v for k, v in r.items() if k not in times} for r in records(tmp_path / name)]
        for name in ("whole", "cut")
    )
    assert one == other


def test_what_happens_once_is_mended_by_going_back(tmp_path, caplog):
    batches = Faulty(dict.fromkeys((16, 17, 18), np.nan), times=1)
    done = run(tmp_path / "run", batches)
    assert batches.begun == [0, 15]
    assert_same(done, run(tmp_path / "quiet", Faulty({})))
    assert steps_saved(tmp_path / "run") == ["5", "10", "15", "20", "24"]
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(2, 25, 2))
    assert not any(r["skipped"] for r in records(tmp_path / "run")), "undone with its steps"
    (told,) = [m for m in caplog.messages if "going back" in m]
    assert told.startswith("steps 17 to 19 were skipped (batches 16 to 18; at the last one loss = ")
    assert told.endswith("gradient norm = nan): going back to checkpoint 15, once")


def test_later_steps_are_set_aside_and_written_again(tmp_path):
    """A stop saves even among skipped steps; such a checkpoint is no place to go back to."""
    batches = Faulty(dict.fromkeys((15, 16, 17), np.nan), times=1)
    batches.left[17] = 2  # read ahead by the first call
    assert run(tmp_path / "run", batches, stop_after=17).stopped
    done = run(tmp_path / "run", batches)
    assert batches.begun == [0, 17, 15]
    assert steps_saved(tmp_path / "run") == ["5", "10", "15", "20", "24", "17.undone-1"]
    assert_same(done, run(tmp_path / "quiet", Faulty({})))


def test_stops_among_skipped_steps_delete_no_checkpoint_to_go_back_to(tmp_path):
    """Each stop saves; were older ones deleted for it, none would be left that is good."""
    batches = Faulty(dict.fromkeys((15, 16, 17), np.nan), times=1)
    batches.left |= {16: 2, 17: 2}  # read ahead by the calls that are stopped
    recipe = dataclasses.replace(RECIPE, checkpoint=CheckpointConfig(every_steps=5, keep=1))
    assert run(tmp_path / "run", batches, stop_after=16, recipe=recipe).stopped
    assert run(tmp_path / "run", batches, stop_after=1, recipe=recipe).stopped
    assert steps_saved(tmp_path / "run") == ["15", "16", "17"]
    done = run(tmp_path / "run", batches, recipe=recipe)
    assert batches.begun == [0, 16, 17, 15]
    assert_same(done, run(tmp_path / "quiet", Faulty({})))
    assert steps_saved(tmp_path / "run") == ["24", "16.undone-1", "17.undone-1"]


def test_before_the_first_checkpoint_it_goes_back_to_the_start(tmp_path):
    batches = Faulty(dict.fromkeys((1, 2, 3), np.nan), times=1)
    assert_same(run(tmp_path / "run", batches), run(tmp_path / "quiet", Faulty({})))
    assert batches.begun == [0, 0]


@pytest.mark.parametrize(
    ("factor", "says"),
    [
        (np.nan, "so the activations of these batches hold values that are not"),
        (1e6, "training diverges here. Lower Optimizer.learning_rate"),
    ],
)
def test_what_happens_twice_is_told(tmp_path, factor, says):
    batches = Faulty(dict.fromkeys(range(16, 24), factor))
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path / "run", batches)
    text = str(caught.value)
    assert "steps 17 to 19 were skipped (batches 16 to 18;" in text and says in text
    assert "a second time since checkpoint 15: the weights there are finite" in text
    assert batches.begun == [0, 15] and steps_saved(tmp_path / "run") == ["5", "10", "15"]


def test_bad_weights_in_a_checkpoint_are_told(tmp_path, monkeypatch):
    run(tmp_path / "run", Faulty({}), stop_after=5)
    from saejax.checkpoint import Checkpoints

    whole = Checkpoints.restore_newest

    def restored(self, *args):
        step, state, metadata = whole(self, *args)
        w_enc = state.params["w_enc"].at[3].set(np.nan)
        return step, dataclasses.replace(state, params=state.params | {"w_enc": w_enc}), metadata

    monkeypatch.setattr(Checkpoints, "restore_newest", restored)
    with pytest.raises(FloatingPointError, match="the weights of checkpoint 5 hold values that"):
        run(tmp_path / "run", Faulty({}))
    assert steps_saved(tmp_path / "run") == ["5"]
