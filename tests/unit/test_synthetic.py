"""Synthetic rows are a pure function of (seed, step) and are what their ground truth says."""

import dataclasses

import numpy as np
import pytest

from saejax.data.synthetic import Synthetic, SyntheticConfig, feature_probabilities

CFG = SyntheticConfig(features=40, d_model=12, mean_l0=3.0, held_out_rows=5000, seed=1)


def test_rows_are_magnitudes_times_directions_plus_noise():
    data = Synthetic(CFG, 2048)
    rows, magnitudes = data.batch(3), data.magnitudes(3)
    assert rows.shape == (2048, 12) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(data.features, axis=1), 1, rtol=1e-6)
    noise = rows.astype(np.float64) - magnitudes.astype(np.float64) @ data.features
    assert abs(noise.std() - 0.01) < 2e-4 and abs(noise.mean()) < 2e-4
    clean = Synthetic(dataclasses.replace(CFG, noise=0.0), 64)
    np.testing.assert_allclose(clean.batch(0), clean.magnitudes(0) @ clean.features, atol=1e-5)


def test_magnitudes_have_the_stated_distribution():
    data = Synthetic(CFG, 512)
    _, magnitudes = data.held_out()
    active = magnitudes > 0
    sigma = np.sqrt(data.probabilities * (1 - data.probabilities) / len(active))
    assert (np.abs(active.mean(0) - data.probabilities) < 5 * sigma).all()
    sizes = magnitudes[active]
    assert sizes.min() >= 0.5
    assert abs((sizes - 0.5).mean() - 0.5) < 0.02 and abs((sizes - 0.5).std() - 0.5) < 0.02


@pytest.mark.parametrize("mean_l0", [0.1, 3.0, 10.0, 20.0])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_probabilities_are_a_capped_power_law_with_the_stated_mean(mean_l0, exponent):
    cfg = dataclasses.replace(CFG, mean_l0=mean_l0, exponent=exponent)
    p = feature_probabilities(cfg)
    assert abs(p.sum() - mean_l0) < 1e-9 and p.max() <= 0.5 and (np.diff(p) <= 0).all()
    free = np.flatnonzero(p < 0.5)
    ratio = p[free] * (free + 1.0) ** exponent
    np.testing.assert_allclose(ratio, ratio[:1].repeat(len(ratio)), rtol=1e-9)


def test_pure_in_seed_and_step():
    data = Synthetic(CFG, 64)
    later = list(Synthetic(CFG, 64).iterate(5, 8))
    for step, rows in zip((5, 6, 7), later, strict=True):
        np.testing.assert_array_equal(rows, data.batch(step))
    batches = [data.batch(step) for step in range(4)]
    other = Synthetic(dataclasses.replace(CFG, seed=2), 64)
    assert not np.array_equal(other.features, data.features)
    everything = np.concatenate([*batches, data.held_out()[0], other.batch(0)])
    assert len(np.unique(everything, axis=0)) == len(everything)
    assert data.held_out()[0].shape == (5000, 12)
    np.testing.assert_array_equal(data.sample_rows(100), np.concatenate(batches)[:100])


def test_a_process_gets_its_rows_of_the_global_batch():
    data, ranges = Synthetic(CFG, 64), ((0, 5), (16, 32), (63, 64))
    rows = np.concatenate([np.arange(a, b) for a, b in ranges])
    for call in ("batch", "magnitudes"):
        whole = getattr(data, call)(2)
        np.testing.assert_array_equal(getattr(data, call)(2, ranges), whole[rows])
    np.testing.assert_array_equal(next(data.iterate(2, ranges=ranges)), data.batch(2)[rows])
    with pytest.raises(ValueError, match="must be ascending, disjoint"):
        data.batch(0, ((0, 65),))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", 0),
        ("d_model", 0),
        ("mean_l0", 21.0),
        ("mean_l0", 0.0),
        ("noise", -1.0),
        ("noise", float("nan")),
        ("exponent", -1.0),
        ("max_probability", 1.5),
        ("seed", -1),
    ],
)
def test_wrong_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"Synthetic.{field} = {value}"):
        dataclasses.replace(CFG, **{field: value})


def test_wrong_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size = 0"):
        Synthetic(CFG, 0)
    with pytest.raises(ValueError, match="step = -1"):
        Synthetic(CFG, 10).batch(-1)
