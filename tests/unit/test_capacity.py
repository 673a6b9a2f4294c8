"""The rule for candidates a shard: its formula against exact counting, sampling and the paper."""

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest

from saejax import capacity
from saejax.capacity import TopKConfig, expected_loss, expected_share_at_capacity, warning_share

GPT4 = 16_777_216
DEFAULT, PAPER = TopKConfig(), TopKConfig(max_expected_loss=None)
EXACT = TopKConfig(capacity_factor=None)


def falling(n: int, m: int) -> int:
    """n (n - 1) ... (n - m + 1): binomials of 2^30 latents would take megabytes."""
    return math.prod(range(n - m + 1, n + 1))


def exact(k: int, n: int, shards: int, size: int) -> tuple[Fraction, Fraction]:
    """Expected loss and P(a shard holds `size` or more), in rational numbers."""
    drawn = n // shards
    ways = {
        x: math.comb(k, x) * falling(drawn, x) * falling(n - drawn, k - x)
        for x in range(min(k, drawn) + 1)
        if k - x <= n - drawn
    }
    assert sum(ways.values()) == falling(n, k)  # Vandermonde: every latent is somewhere
    lost = sum((x - size) * way for x, way in ways.items() if x > size)
    full = sum(way for x, way in ways.items() if x >= size)
    return Fraction(lost * shards, k * falling(n, k)), Fraction(full, falling(n, k))


def close(ours: float, true: Fraction, relative: float) -> bool:
    return abs(Fraction(ours) - true) <= Fraction(relative) * true


def test_against_every_placement_counted_one_by_one():
    # 8 latents, 4 of them kept, on 2 shards: all 70 ways to choose the kept ones.
    for size in range(5):
        held = [sum(i < 4 for i in kept) for kept in itertools.combinations(range(8), 4)]
        lost = Fraction(sum(max(x - size, 0) + max(4 - x - size, 0) for x in held), 4 * len(held))
        assert close(expected_loss(4, 8, 2, size), lost, 1e-12)


@pytest.mark.parametrize(
    "n, shards", [(1, 1), (2, 2), (6, 1), (6, 2), (6, 3), (6, 6), (24, 4), (60, 12)]
)
def test_small_cases_in_rational_numbers(n, shards):
    for k in range(1, n + 1):  # k = n and n / shards < k among them
        for size in range(min(k, n // shards) + 1):
            lost, full = exact(k, n, shards, size)
            assert close(expected_loss(k, n, shards, size), lost, 1e-12)
            if size < min(k, n // shards):
                assert close(expected_share_at_capacity(k, n, shards, size), full, 1e-12)


@pytest.mark.parametrize("n", [2**20, 2**24, 2**27, 2**30])
@pytest.mark.parametrize("k, shards", [(32, 512), (256, 8), (256, 512), (512, 512)])
def test_no_digits_are_lost_at_many_latents(n, k, shards):
    fits = capacity.smallest_capacity(k, n, shards, 1e-5)
    for size in (1, fits, fits + 3):
        lost, full = exact(k, n, shards, size)
        assert close(expected_loss(k, n, shards, size), lost, 1e-12)
        assert close(expected_share_at_capacity(k, n, shards, size), full, 1e-12)


@pytest.mark.parametrize("k, n, shards, size", [(16, 512, 8, 3), (64, 128, 4, 17), (5, 60, 12, 1)])
def test_against_sampled_placements(k, n, shards, size):
    rng = np.random.default_rng(0)
    places = rng.permuted(np.tile(np.arange(n), (20_000, 1)), axis=1)[:, :k] // (n // shards)
    held = (places[:, :, None] == np.arange(shards)).sum(1)
    lost = np.maximum(held - size, 0).sum(1) / k
    full = (held >= size).mean(1)
    for sampled, expected in (
        (lost, expected_loss(k, n, shards, size)),
        (full, expected_share_at_capacity(k, n, shards, size)),
    ):
        assert abs(sampled.mean() - expected) < 5 * sampled.std() / len(sampled) ** 0.5
        assert expected > 0.01


@pytest.mark.parametrize(
    "k, shards, paper, percent, thousandth, default",
    [
        (256, 512, 1, "21", 4, 6),
        (256, 256, 2, "10", 5, 8),
        (256, 128, 4, "3.7", 7, 10),
        (256, 64, 8, "0.8", 10, 14),
        (256, 32, 16, "0.07", 16, 21),
        (32, 512, 1, "3.0", 2, 3),
    ],
)
def test_the_published_table_at_16_million_latents(k, shards, paper, percent, thousandth, default):
    assert PAPER.capacity(k, GPT4, shards) == paper
    digits = len(percent.partition(".")[2])
    assert f"{100 * expected_loss(k, GPT4, shards, paper):.{digits}f}" == percent
    at_a_thousandth = TopKConfig(max_expected_loss=1e-3)
    assert at_a_thousandth.capacity(k, GPT4, shards) == max(thousandth, paper)
    assert DEFAULT.capacity(k, GPT4, shards) == default
    assert expected_loss(k, GPT4, shards, default) < 1e-5
    assert expected_loss(k, GPT4, shards, default - 1) >= 1e-5


def test_the_prototype_that_was_run():
    # Sharded against exact selection on 8 shards: 17.3, 7.7, 0.49 and 0.030 % were lost.
    ran = {4: 0.173, 8: 0.077, 32: 0.0049, 64: 0.00030}
    for k, lost in ran.items():
        assert expected_loss(k, 2048, 8, 2 * k // 8) == pytest.approx(lost, rel=0.1)


@pytest.mark.parametrize("k", [1, 3, 16, 100])
@pytest.mark.parametrize("n, shards", [(100, 1), (100, 2), (1000, 8), (1000, 125), (1000, 1000)])
def test_the_rule_is_the_smallest_that_keeps_its_promises(k, n, shards):
    size, most = DEFAULT.capacity(k, n, shards), min(k, n // shards)
    assert PAPER.capacity(k, n, shards) <= size <= EXACT.capacity(k, n, shards) == most
    assert expected_loss(k, n, shards, size) < 1e-5
    assert size * shards >= k
    fewer = size - 1
    assert fewer < 2 * k / shards or expected_loss(k, n, shards, fewer) >= 1e-5
    assert expected_loss(k, n, shards, most) == 0
    assert expected_share_at_capacity(k, n, shards, most) == 0
    losses = [expected_loss(k, n, shards, c) for c in range(most + 1)]
    assert losses[0] == pytest.approx(1) and losses == sorted(losses, reverse=True)


def test_edges():
    assert DEFAULT.capacity(32, 4096, 1) == 32  # one shard is exact
    assert DEFAULT.capacity(64, 64, 8) == 8  # every latent is kept
    assert DEFAULT.capacity(2000, 4096, 512) == 8  # a shard has 8 latents
    assert DEFAULT.capacity(3, 64, 64) == 1  # and here one, whatever it is
    assert PAPER.capacity(4, 4096, 512) == 1  # k below the shards
    assert EXACT.capacity(4, 4096, 512) == 4
    assert TopKConfig(capacity_factor=1.0, max_expected_loss=None).capacity(9, 80, 8) == 2
    for rule in (DEFAULT, PAPER, EXACT):
        assert rule.capacity(0, 4096, 8) == 0  # AuxK switched off
    assert expected_loss(0, 4096, 8, 0) == 0 == expected_share_at_capacity(0, 4096, 8, 0)


def test_the_factor_is_a_floor_and_an_exact_capacity_is_a_ceiling():
    # Factor 2 is safe already for large k on few shards.
    assert DEFAULT.capacity(256, GPT4, 8) == PAPER.capacity(256, GPT4, 8) == 64
    assert TopKConfig(capacity_factor=4).capacity(256, GPT4, 8) == 128
    assert TopKConfig(capacity_factor=1e9).capacity(256, GPT4, 8) == 256
    strict = TopKConfig(max_expected_loss=1e-300)
    assert strict.capacity(16, 4096, 8) == 16


def test_warning_share_is_five_times_what_is_expected():
    share = expected_share_at_capacity(256, GPT4, 512, 6)
    assert warning_share(256, GPT4, 512) == pytest.approx(5 * share)
    # It is quiet at the default capacity and loud at the paper's.
    assert share < warning_share(256, GPT4, 512) < 1e-3
    assert expected_share_at_capacity(256, GPT4, 512, 1) > 0.3
    # A larger capacity than the smallest is quieter still.
    assert expected_share_at_capacity(256, GPT4, 8, 64) < warning_share(256, GPT4, 8)
    # Where only the exact capacity is good enough, any share is too much.
    assert warning_share(4, 64, 8) == 0
    assert warning_share(999_900, 1_000_000, 2) == 1  # it is a share


@pytest.mark.parametrize("factor", [0, 0.99, -2, math.inf, math.nan])
def test_a_bad_factor(factor):
    with pytest.raises(ValueError, match=r"capacity_factor = .* fewer than k .* None .*exact"):
        TopKConfig(capacity_factor=factor)


@pytest.mark.parametrize("loss", [0, 1, -1e-5, math.nan])
def test_a_bad_loss(loss):
    with pytest.raises(ValueError, match=r"max_expected_loss = .* between 0 and 1 .* None"):
        TopKConfig(max_expected_loss=loss)


def test_a_bad_exchange():
    with pytest.raises(ValueError, match=r"exchange = 'gather' must be 'all_to_all' or"):
        TopKConfig(exchange="gather")


@pytest.mark.parametrize("rule", [DEFAULT, PAPER, EXACT])
def test_bad_sizes(rule):
    with pytest.raises(ValueError, match=r"k = 65 must lie between 0 and n_latents = 64"):
        rule.capacity(65, 64, 8)
    with pytest.raises(ValueError, match=r"k = -1 must lie"):
        rule.capacity(-1, 64, 8)
    for shards in (0, 7, 128, -8):
        with pytest.raises(ValueError, match=rf"shards = {shards} must .* divide n_latents = 64"):
            rule.capacity(4, 64, shards)


@pytest.mark.parametrize("loss", [0, -1, math.nan])
def test_a_loss_that_no_capacity_is_below(loss):
    with pytest.raises(ValueError, match=r"max_loss = .* must be above 0; for no loss at all"):
        capacity.smallest_capacity(4, 64, 8, loss)


def test_the_rule_takes_milliseconds():
    began = time.process_time()
    for k in (1020, 1021, 1022, 1023, 1024):  # nothing is remembered between them
        DEFAULT.capacity(k, GPT4, 512)
        DEFAULT.capacity(k, GPT4, 32)
        warning_share(k, GPT4, 2)
    assert (time.process_time() - began) / 15 < 0.05
