"""Top activating contexts: equal to brute force, ties included, in whatever order they come."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.evals.metrics import LatentStatistics
from saejax.latents import summaries
from saejax.latents.summaries import EMPTY, ContextBlock, TopExamples
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig

LATENTS, WIDTH, ROWS, LENGTH, COUNT = 20, 8, 5, 6, 60


@pytest.fixture(scope="module")
def sae():
    w = jax.random.normal(jax.random.key(0), (LATENTS, WIDTH))
    params = {"w_enc": w, "w_dec": w / jnp.linalg.norm(w, axis=1, keepdims=True)}
    params |= {"latent_bias": jnp.zeros(LATENTS), "pre_bias": jnp.zeros(WIDTH)}
    return SAE(SAEConfig(d_model=WIDTH, n_latents=LATENTS, k=3), params, Normalizer())


@pytest.fixture(scope="module")
def block():
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(COUNT, ROWS, WIDTH)).astype("f4")
    rows[COUNT // 2 :] = rows[: COUNT // 2]  # every context twice: all scores are tied in pairs
    ids = generator.permutation(10 * COUNT)[:COUNT]
    stored = np.tile(generator.random((COUNT // 2, ROWS)) < 0.8, (2, 1))
    return ContextBlock(
        rows=rows,
        tokens=generator.integers(0, 99, (COUNT, LENGTH)).astype("u4"),
        document=np.arange(COUNT, dtype="u4"),
        offset=np.arange(COUNT, dtype="u4") * LENGTH,
        ids=ids,
        stored=stored,
    )


def part(block, at):
    arrays = {f.name: getattr(block, f.name)[at] for f in dataclasses.fields(block)}
    return ContextBlock(**arrays)


def same(a, b):
    for field in dataclasses.fields(TopExamples):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), field.name)


def dense_values(sae, block):
    code = sae.encode(block.rows)
    z = np.zeros((*block.rows.shape[:2], LATENTS), np.float32)
    np.put_along_axis(z, np.asarray(code.indices), np.asarray(code.values), axis=-1)
    return z * block.stored[:, :, None]  # a masked position counts for no latent


def test_equal_to_brute_force(sae, block):
    chosen, top = [11, 2, 7], 9
    found = summaries.top_examples(sae, [block], chosen, top)
    assert found.latents.tolist() == [2, 7, 11] and found.contexts == COUNT
    z = dense_values(sae, block)
    for latent in chosen:
        row = found.row(latent)
        score = z[:, :, latent].max(1)
        best = sorted(range(COUNT), key=lambda c: (-score[c], block.ids[c]))
        best = [c for c in best if score[c] > 0][:top]
        assert len(best) >= 4
        assert len(found.of_latent(latent)) == len(best)
        np.testing.assert_array_equal(found.ids[row, : len(best)], block.ids[best])
        np.testing.assert_allclose(found.score[row, : len(best)], score[best], rtol=1e-6)
        np.testing.assert_array_equal(found.tokens[row, : len(best)], block.tokens[best])
        np.testing.assert_array_equal(found.document[row, : len(best)], block.document[best])
        np.testing.assert_array_equal(found.offset[row, : len(best)], block.offset[best])
        # The first position is not stored: the window still has all of its tokens.
        np.testing.assert_array_equal(found.values[row, :, : LENGTH - ROWS], 0)
        np.testing.assert_allclose(
            found.values[row, : len(best), LENGTH - ROWS :], z[best, :, latent], rtol=1e-6
        )


@pytest.mark.parametrize("seed", range(4))
def test_any_split_in_any_order_gives_the_same_examples(sae, block, seed):
    generator = np.random.default_rng(seed)
    order = generator.permutation(COUNT)
    # Equal sizes, so that the same compiled program codes every part.
    parts = [part(block, np.sort(at)) for at in np.split(order, 6)]
    whole = summaries.top_examples(sae, [part(block, np.arange(COUNT))], [2, 7, 11], 5)
    states = [summaries.top_examples(sae, [p], [2, 7, 11], 5) for p in parts]
    left = states[0]
    for state in states[1:]:
        left = left.merge(state)
    right = states[3].merge(states[1]).merge(states[5].merge(states[4].merge(states[0])))
    right = right.merge(states[2])
    same(left, right)
    same(left, summaries.top_examples(sae, parts[::-1], [11, 7, 2], 5))
    np.testing.assert_array_equal(left.ids, whole.ids)
    same(left, left.merge(TopExamples.empty([2, 7, 11], 5, LENGTH)))


def test_the_stored_rows_are_those_of_the_mask(block):
    assert block.stored_rows().shape == (block.stored.sum(), WIDTH) != block.rows.shape
    np.testing.assert_array_equal(block.stored_rows(), block.rows[block.stored])
    whole = dataclasses.replace(block, stored=np.ones_like(block.stored))
    assert whole.stored_rows() is block.rows
    assert dataclasses.replace(block, stored=None).stored_rows() is block.rows


def test_a_latent_that_never_fires_has_no_examples(sae, block):
    w = sae.params
    silent = w | {"latent_bias": w["latent_bias"].at[4].set(-100.0)}
    sae = SAE(sae.config, silent, Normalizer())
    found = summaries.top_examples(sae, [block], [4, 5], 3)
    assert len(found.of_latent(4)) == 0 and len(found.of_latent(5)) == 3
    assert (found.ids[0] == EMPTY).all() and not found.values[0].any()


def test_refusals(sae, block):
    with pytest.raises(ValueError, match="contexts: 0"):
        summaries.top_examples(sae, [], [1])
    with pytest.raises(ValueError, match=r"0\.\.19"):
        summaries.top_examples(sae, [block], [20])
    with pytest.raises(ValueError, match="occurs twice"):
        summaries.top_examples(sae, [block, block], [1])
    with pytest.raises(ValueError, match=r"allowed: \[1\]"):
        summaries.top_examples(sae, [block], [1]).row(2)


def statistics(count):
    zeros = np.zeros(len(count))
    return LatentStatistics(
        tokens=1000, count=np.asarray(count), total=zeros, square=zeros, peak=zeros
    )


def test_latents_are_drawn_one_from_each_density_group():
    count = np.random.default_rng(0).permutation(100) * 3
    chosen = summaries.spread_over_density(statistics(count), 9, seed=1)
    ranked = np.argsort(-count, kind="stable")[:99]  # the last one never fired
    groups = np.split(ranked, 9)
    assert [int(np.isin(chosen, group).sum()) for group in groups] == [1] * 9
    again = summaries.spread_over_density(statistics(count), 9, seed=1)
    other = summaries.spread_over_density(statistics(count), 9, seed=2)
    assert chosen.tolist() == again.tolist() != other.tolist()
    few = summaries.spread_over_density(statistics([0, 5, 0, 7, 7]), 9, seed=1)
    assert few.tolist() == [3, 4, 1]
    assert summaries.spread_over_density(statistics([0, 0]), 9, seed=1).tolist() == []
