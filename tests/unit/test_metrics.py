"""Metrics: exact values, invariance to how rows are split, and refusal of empty or broken sets."""

import numpy as np
import pytest

from saejax.evals.metrics import LatentStatistics, Moments, Reconstruction


def random_pair(rows=257, width=7, shift=0.0, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(rows, width)) * np.arange(1, width + 1) + shift
    return x, x + 0.3 * generator.normal(size=x.shape)


def merged(parts):
    result = None
    for part in parts:
        result = part if result is None else result.merge(part)
    return result


def test_nmse_is_error_over_the_error_of_predicting_the_mean():
    x, x_hat = random_pair()
    expected = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    state = Reconstruction.of(x, x_hat)
    assert state.nmse == pytest.approx(expected, rel=1e-12)
    assert state.explained_variance == pytest.approx(1 - expected, rel=1e-12)


def test_the_mean_scores_one_and_the_rows_themselves_zero():
    x, _ = random_pair()
    mean = np.broadcast_to(x.mean(0), x.shape)
    assert Reconstruction.of(x, mean).nmse == pytest.approx(1, rel=1e-12)
    perfect = Reconstruction.of(x, x)
    assert (perfect.nmse, perfect.explained_variance) == (0, 1)
    assert perfect.mean_cosine == pytest.approx(1) and perfect.shrinkage == pytest.approx(1)


def test_cosine_and_shrinkage_are_means_over_rows():
    x = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    state = Reconstruction.of(x, np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 1.0]]))
    assert state.mean_cosine == pytest.approx(1 / 3)
    assert state.shrinkage == pytest.approx((1 + 2) / 2)  # undefined for the row of zeros


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_reconstruction_does_not_depend_on_the_split(seed, shift):
    x, x_hat = random_pair(shift=shift, seed=seed)
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(np.arange(1, len(x)), 12, replace=False))
    parts = [Reconstruction.of(*pair) for pair in zip(np.split(x, cuts), np.split(x_hat, cuts))]
    generator.shuffle(parts)
    whole, split = Reconstruction.of(x, x_hat), merged([Reconstruction.empty(7), *parts])
    # Rows near 1e5 carry absolute rounding of 1e-11: the bound follows the data, not the method.
    bound = 1e-12 if shift == 0 else 1e-9
    for name in ("nmse", "explained_variance", "mean_cosine", "shrinkage"):
        assert getattr(split, name) == pytest.approx(getattr(whole, name), rel=bound), name


def test_moments_survive_a_large_common_offset():
    x, _ = random_pair(rows=1000)
    blocks = np.split(x + 1e8, 10)
    state = merged([Moments.of(block) for block in blocks])
    exact = ((x - x.mean(0)) ** 2).sum()
    assert state.deviation == pytest.approx(exact, rel=1e-6)  # E[x^2] - E[x]^2 would keep no digit


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused(bad):
    x, x_hat = random_pair()
    x_hat[3, 2] = bad
    with pytest.raises(ValueError, match="1 of 257 rows"):
        Reconstruction.of(x, x_hat)


def test_an_empty_or_constant_set_has_no_nmse():
    with pytest.raises(ValueError, match="0 rows"):
        _ = Reconstruction.empty(3).nmse
    with pytest.raises(ValueError, match="total variance 0"):
        _ = Reconstruction.of(np.ones((4, 3)), np.ones((4, 3))).nmse
    with pytest.raises(ValueError, match="at least 1"):
        _ = LatentStatistics.empty(3).l0
    with pytest.raises(ValueError, match="width"):
        Moments.empty(3).merge(Moments.empty(4))


def sparse_code(tokens=500, latents=40, k=6, seed=0):
    generator = np.random.default_rng(seed)
    chance = generator.random(latents) ** 4
    indices = np.stack(
        [
            generator.choice(latents, k, replace=False, p=chance / chance.sum())
            for _ in range(tokens)
        ]
    )
    values = np.maximum(generator.normal(0.5, 1, size=indices.shape), 0).astype(np.float32)
    return values, indices.astype(np.int32)


def dense(values, indices, latents):
    z = np.zeros((len(values), latents))
    np.put_along_axis(z, indices, values.astype(np.float64), axis=1)
    return z


def test_latent_statistics_equal_those_of_the_dense_code():
    values, indices = sparse_code()
    z = dense(values, indices, 40)
    state = LatentStatistics.of(values.reshape(5, 100, 6), indices.reshape(5, 100, 6), 40)
    assert state.tokens == 500
    np.testing.assert_array_equal(state.count, (z > 0).sum(0))
    np.testing.assert_allclose(state.total, z.sum(0), rtol=1e-13)
    np.testing.assert_allclose(state.square, (z**2).sum(0), rtol=1e-13)
    np.testing.assert_array_equal(state.peak, z.max(0))
    assert state.l0 == (z > 0).sum() / 500
    assert state.dead_fraction == (~(z > 0).any(0)).mean()
    assert state.dense_fraction(0.1) == ((z > 0).mean(0) > 0.1).mean()
    density = np.sort((z > 0).mean(0))[::-1]
    assert state.densest_share(8) == pytest.approx(density[:8].mean() / density.sum())
    assert state.densest_share(4096) == pytest.approx(1 / 40)


@pytest.mark.parametrize("pieces", [1, 3, 500])
def test_latent_statistics_do_not_depend_on_the_split(pieces):
    values, indices = sparse_code()
    whole = LatentStatistics.of(values, indices, 40)
    cut = zip(np.array_split(values, pieces), np.array_split(indices, pieces))
    split = merged([LatentStatistics.of(*pair, 40) for pair in cut])
    assert split.tokens == whole.tokens
    np.testing.assert_array_equal(split.count, whole.count)
    np.testing.assert_array_equal(split.peak, whole.peak)
    np.testing.assert_allclose(split.total, whole.total, rtol=1e-12)
    np.testing.assert_allclose(split.square, whole.square, rtol=1e-12)


def test_an_index_outside_the_dictionary_is_refused():
    with pytest.raises(ValueError, match=r"allowed: 0\.\.9"):
        LatentStatistics.of(np.ones((1, 1)), np.full((1, 1), 10), 10)


def test_density_histogram_counts_every_living_latent_once():
    state = LatentStatistics(
        tokens=1000,
        count=np.array([0, 0, 1, 10, 10, 1000]),
        total=np.zeros(6),
        square=np.zeros(6),
        peak=np.zeros(6),
    )
    histogram = state.density_histogram(bins_per_decade=1, decades=4)
    assert histogram["log10_edges"] == [-4, -3, -2, -1, 0]
    assert histogram["latents"] == [0, 1, 2, 1]
    rare = state.density_histogram(bins_per_decade=1, decades=2)
    assert rare["latents"] == [3, 1]  # what is rarer than the first edge is in the first bin
