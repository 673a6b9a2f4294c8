"""Whether a run may go on from a checkpoint, and with which normaliser."""

import dataclasses

import numpy as np
import pytest

from saejax.checkpoint import CheckpointConfig, Checkpoints
from saejax.fit import fit
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.provenance import kept_normalizer
from saejax.recipe import Recipe
from saejax.train.loop import TrainConfig

MEASURED = Normalizer(kind="scalar", scale=5.0)


def test_a_scale_that_differs_by_rounding_stays_that_of_the_checkpoint():
    near = Normalizer(kind="scalar", scale=5.0 * (1 + 1e-7))
    assert kept_normalizer(dataclasses.asdict(near), MEASURED) == near
    far = {"kind": "scalar", "scale": 5.06}
    assert kept_normalizer(far, MEASURED) is MEASURED
    assert kept_normalizer({"kind": "none", "scale": 5.0}, MEASURED) is MEASURED


class Rounded:
    """Rows whose values are off by some share, as on another device."""

    d_model, tokens_per_epoch = 8, 64

    def __init__(self, share: float):
        self._rows = np.random.default_rng(0).standard_normal((64, 8), np.float32) * (1 + share)

    def sample_rows(self, n: int) -> np.ndarray:
        return self._rows[:n]

    def iterate(self, start_step=0, ranges=None):
        while True:
            yield self._rows[:16]


def test_a_run_goes_on_with_the_scale_of_its_checkpoint(tmp_path):
    recipe = Recipe(
        sae=SAEConfig(d_model=8, n_latents=16, k=2, normalization="scalar"),
        train=TrainConfig(tokens=4 * 16, batch_size=16, log_every=2, sample_rows=64),
        checkpoint=CheckpointConfig(every_steps=2, keep=None),
    )
    place = {"checkpoints": tmp_path / "checkpoints", "write_to": tmp_path}
    asked = iter(range(99))
    stopped = {"stop_requested": lambda: next(asked) > 0}
    first = fit(recipe, Rounded(0.0), identity={}, **stopped, **place)
    assert first.stopped
    scale = first.sae.normalizer.scale
    with pytest.raises(ValueError, match="normaliser"):
        fit(recipe, Rounded(0.1), identity={}, **place)
    second = fit(recipe, Rounded(1e-4), identity={}, **place)
    assert not second.stopped and second.sae.normalizer.scale == scale
    store = Checkpoints(tmp_path / "checkpoints", alone=True)
    assert {store.metadata(step)["normalizer"]["scale"] for step in store.steps()} == {scale}
