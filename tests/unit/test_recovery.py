"""Recovery scores on cases whose answer is known."""

import numpy as np
import pytest

from saejax.evals import recovery

RNG = np.random.default_rng(0)


def unit(n, d):
    rows = RNG.standard_normal((n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_permuted_and_scaled_truth_is_found_exactly():
    features = unit(30, 16)
    order = RNG.permutation(30)
    dictionary = np.concatenate([np.zeros((1, 16)), features[order] * 3.7])
    cosines, latents = recovery.match(features, dictionary)
    np.testing.assert_allclose(cosines, 1.0, atol=1e-12)
    np.testing.assert_array_equal(latents, np.argsort(order) + 1)
    scores = recovery.recovery(features, np.linspace(1, 0, 30), dictionary)
    assert scores["matched"] == scores["matched_common"] == 1.0
    assert abs(scores["mmcs"] - 1) < 1e-12 and scores["chance_mmcs"] < 0.75


def test_cosines_by_hand_and_no_credit_for_the_opposite_direction():
    features = np.eye(2)
    dictionary = np.array([[3.0, 4.0], [-1.0, 0.0]])
    cosines, latents = recovery.match(features, dictionary)
    np.testing.assert_allclose(cosines, [0.6, 0.8])
    assert latents.tolist() == [0, 0]


def test_common_half_and_threshold():
    features = np.eye(5)
    probabilities = np.array([0.1, 0.5, 0.2, 0.4, 0.3])
    assert recovery.commoner_half(probabilities).tolist() == [False, True, False, True, True]
    dictionary = np.eye(5)[[1, 3]]
    scores = recovery.recovery(features, probabilities, dictionary)
    assert scores["matched"] == 2 / 5 and scores["matched_common"] == 2 / 3
    assert scores["mmcs"] == 2 / 5 and scores["mmcs_common"] == pytest.approx(2 / 3)
    halfway = np.array([[1.0, 1.0, 0, 0, 0]])
    assert recovery.recovery(features, probabilities, halfway, threshold=0.7)["matched"] == 2 / 5
    assert recovery.recovery(features, probabilities, halfway, threshold=0.8)["matched"] == 0


def test_chance_level_is_the_known_one():
    """1024 random directions in 64 dimensions reach a mean maximum cosine near 0.39."""
    chance = recovery.chance(unit(512, 64), 1024)
    assert abs(chance.mean() - 0.39) < 0.01 and (chance < 0.9).all()


def test_f1_by_hand():
    magnitudes = np.array([[1.0, 0], [2.0, 0], [0, 0.5], [0.1, 0]])
    values = np.array([[0.9, 0.0], [0.05, 0.3], [0.2, 0.8], [0.7, 0.0]])
    indices = np.array([[3, 1], [3, 1], [3, 2], [3, 0]])
    f1 = recovery.f1_of_matches(magnitudes, values, indices, np.array([3, 2]), 4)
    # latent 3: active in all four rows, three of them right; latent 2: exactly right
    np.testing.assert_allclose(f1, [2 * 3 / (3 + 4), 1.0])
    f1 = recovery.f1_of_matches(magnitudes, values, indices, np.array([3, 2]), 4, threshold=0.5)
    np.testing.assert_allclose(f1, [2 * 2 / (3 + 2), 1.0])
    assert (
        recovery.f1_of_matches(magnitudes * 0, values * 0, indices, np.array([3, 2]), 4).sum() == 0
    )
    scores = recovery.f1_scores(np.array([0.5, 1.0]), np.array([0.1, 0.9]))
    assert scores == {"f1": 0.75, "f1_common": 1.0}


def test_f1_does_not_depend_on_the_block(monkeypatch):
    magnitudes = RNG.random((100, 6)) * (RNG.random((100, 6)) < 0.3)
    indices = np.argsort(RNG.random((100, 9)), axis=1)[:, :4]
    values = RNG.random((100, 4)) * (RNG.random((100, 4)) < 0.7)
    latents = RNG.integers(0, 9, 6)
    whole = recovery.f1_of_matches(magnitudes, values, indices, latents, 9)
    dense = np.zeros((100, 9))
    np.put_along_axis(dense, indices, values, 1)
    on, hit = magnitudes > 0, dense[:, latents] > 0
    expected = 2 * (on & hit).sum(0) / (on.sum(0) + hit.sum(0))
    np.testing.assert_allclose(whole, expected)
    monkeypatch.setattr(recovery, "_BLOCK", 7)
    np.testing.assert_array_equal(
        recovery.f1_of_matches(magnitudes, values, indices, latents, 9), whole
    )


def test_mismatched_inputs_are_refused():
    with pytest.raises(ValueError, match="width 3, the dictionary 4"):
        recovery.match(np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="at least one row"):
        recovery.match(np.ones((2, 3)), np.ones((0, 3)))
