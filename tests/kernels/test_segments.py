"""Sorting of pairs and cutting of long segments, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.weight_grads import segments as lib


def test_pairs_are_sorted_by_latent_then_token():
    indices_BK = np.random.default_rng(0).integers(0, 7, (50, 4)).astype(np.int32)
    got = jax.jit(lib.sort_pairs)(indices_BK)
    order = np.argsort(indices_BK.reshape(-1), kind="stable")
    np.testing.assert_array_equal(got.order_P, order)
    np.testing.assert_array_equal(got.latents_P, indices_BK.reshape(-1)[order])
    np.testing.assert_array_equal(got.tokens_P, order // 4)


def test_no_pairs_at_all():
    got = lib.sort_pairs(jnp.zeros((0, 4), jnp.int32))
    assert [len(x) for x in got] == [0, 0, 0]
    cut = lib.segments(got.latents_P, 5)
    assert not np.asarray(cut.starts_L).any() and not np.asarray(cut.ends_L).any()
    assert len(cut.piece_starts_E) == 0


def assert_covers(latents_P, n, longest):
    """Every pair of a latent lies in its segment, or in exactly one of its pieces, in order."""
    latents_P = np.sort(np.asarray(latents_P, np.int32))
    cut = jax.jit(lib.segments, static_argnames=("n", "longest"))(
        jnp.asarray(latents_P), n=n, longest=longest
    )
    starts, ends, offsets, piece_starts, piece_ends = map(np.asarray, cut)
    for latent in range(n):
        want = np.flatnonzero(latents_P == latent)
        pieces = range(offsets[latent], offsets[latent + 1])
        assert (len(pieces) > 0) == (len(want) > longest)
        spans = [(starts[latent], ends[latent])]
        spans += [(piece_starts[e], piece_ends[e]) for e in pieces]
        assert all(end - start <= longest for start, end in spans)
        np.testing.assert_array_equal(np.concatenate([np.arange(*span) for span in spans]), want)
    assert offsets[-1] <= len(piece_starts)
    np.testing.assert_array_equal(piece_starts[offsets[-1] :], piece_ends[offsets[-1] :])


@pytest.mark.parametrize(
    "counts",
    [
        [0, 3, 4, 5, 0, 8, 9, 0],  # at the limit of 4, one over, two pieces, one over
        [5] * 8,  # as many pieces as fit
        [100, 0, 0, 1, 0, 0, 0, 0],
        [0] * 7 + [37],
        [1] * 8,
        [4, 0, 0, 0, 0, 0, 0, 0],  # too few pairs for any piece
    ],
)
@pytest.mark.parametrize("unused", [0, 11])
def test_segments_and_pieces_cover_every_pair_once(counts, unused):
    latents = np.repeat(np.arange(len(counts) + 1), [*counts, unused])
    assert_covers(latents, len(counts), 4)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 6), min_size=60, max_size=60))
def test_any_list(latents):
    assert_covers(latents, 6, 5)


def test_bound_of_pieces_is_reached_by_no_list():
    for longest in (1, 3, 8):
        for pairs in range(1, 60):
            # The worst case: segments one pair too long.
            worst = 2 * (pairs // (longest + 1)) if pairs > longest else 0
            assert worst <= lib.most_pieces(pairs, longest)
            single = -(-pairs // longest) if pairs > longest else 0
            assert single <= lib.most_pieces(pairs, longest)
