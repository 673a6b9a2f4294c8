"""PCA, rows through an autoencoder, and the evaluation as a whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.evals import baselines, rows, suite
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig

WIDTH, LATENTS, KEPT = 12, 32, 4


def autoencoder(seed=0, kind="unit", latents=LATENTS):
    key = jax.random.key(seed)
    w_dec = jax.random.normal(key, (latents, WIDTH))
    w_dec = w_dec / jnp.linalg.norm(w_dec, axis=1, keepdims=True)
    params = {
        "w_enc": 0.5 * w_dec,
        "w_dec": w_dec,
        "latent_bias": jnp.zeros(latents),
        "pre_bias": 0.1 * jnp.ones(WIDTH),
    }
    config = SAEConfig(d_model=WIDTH, n_latents=latents, k=KEPT, normalization=kind)
    return SAE(config, params, Normalizer(kind=kind, scale=3.0 if kind == "scalar" else 1.0))


def activations(count=700, seed=1):
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(count, WIDTH)) * 2.0 ** -np.arange(WIDTH)
    return (5 * mixed @ np.linalg.qr(generator.normal(size=(WIDTH, WIDTH)))[0] + 2).astype("f4")


def test_pca_equals_the_singular_value_decomposition():
    x = activations().astype(np.float64)
    pca = baselines.fit_pca(np.array_split(x, 9), 3)
    _, _, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(pca.reconstruct(x), (x - x.mean(0)) @ v[:3].T @ v[:3] + x.mean(0))


def test_pca_is_scored_on_other_rows_about_their_own_mean():
    train, held = activations(seed=1).astype("f8"), activations(seed=2).astype("f8") + 1
    pca = baselines.fit_pca([train], 2)
    expected = ((held - pca.reconstruct(held)) ** 2).sum() / ((held - held.mean(0)) ** 2).sum()
    assert baselines.pca_nmse(pca, np.array_split(held, 5)) == pytest.approx(expected, rel=1e-12)
    everything = baselines.fit_pca([train], WIDTH)
    assert baselines.pca_nmse(everything, [held]) == pytest.approx(0, abs=1e-20)


def test_pca_refuses_more_components_than_dimensions_and_no_rows():
    with pytest.raises(ValueError, match=r"1\.\.12"):
        baselines.fit_pca([activations()], 13)
    with pytest.raises(ValueError, match="train_rows: 0 rows"):
        baselines.fit_pca([], 2)


@pytest.mark.parametrize("limit", [None, 1, 250, 256, 699, 10_000])
@pytest.mark.parametrize("batch", [1, 100, 4096])
def test_regrouping_keeps_every_row_in_order(limit, batch):
    x = activations()
    blocks = [x[:3], x[3:300].reshape(-1, 3, WIDTH), x[300:300], x[300:]]
    batches = list(rows.regroup(blocks, batch, limit))
    np.testing.assert_array_equal(np.concatenate(batches), x[:limit])
    assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1)


def test_broken_rows_are_refused_by_block():
    x = activations()
    x[5, 0] = np.nan
    with pytest.raises(ValueError, match="1 rows of block 1 hold NaN"):
        list(rows.regroup([activations(), x], 64))
    with pytest.raises(ValueError, match="13 wide; allowed: 12"):
        list(rows.regroup([np.ones((2, 12)), np.ones((2, 13))], 64))


@pytest.mark.parametrize("kind", ["unit", "layer_norm", "scalar", "none"])
def test_nmse_is_taken_in_the_normalised_space_and_variance_in_the_raw_one(kind):
    sae, x = autoencoder(kind=kind), activations()
    done = suite.reconstruct(sae, [x], batch_size=128)
    x_n, offset, scale = sae.normalizer.apply(jnp.asarray(x))
    x_hat = np.asarray(sae(x), np.float64)
    hat_n = (x_hat - np.asarray(offset)) / np.asarray(scale)
    x_n = np.asarray(x_n, np.float64)
    nmse = ((x_n - hat_n) ** 2).sum() / ((x_n - x_n.mean(0)) ** 2).sum()
    variance = 1 - ((x - x_hat) ** 2).sum() / ((x - x.astype("f8").mean(0)) ** 2).sum()
    assert done.normalized.nmse == pytest.approx(nmse, rel=1e-5)
    assert done.raw.explained_variance == pytest.approx(variance, rel=1e-5)


def evaluated(batch_size=256, blocks=1, **settings):
    x = activations()
    config = suite.EvaluationConfig(batch_size=batch_size, **settings)
    return suite.evaluate(
        autoencoder(),
        lambda: np.array_split(x, blocks),
        config,
        train_rows=lambda: [activations(seed=7)],
        untrained=autoencoder(seed=5),
        extra={"recovery": {"mmcs": np.float32(0.5)}},
    )


def numbers(value):
    if isinstance(value, dict):
        return [n for key in sorted(value) for n in numbers(value[key])]
    return [n for item in value for n in numbers(item)] if isinstance(value, list) else [value]


def test_the_evaluation_does_not_depend_on_batches_or_blocks():
    reference = numbers(evaluated()[0])
    for batch_size, blocks in ((64, 1), (1000, 7), (7, 3)):
        np.testing.assert_allclose(numbers(evaluated(batch_size, blocks)[0]), reference, rtol=2e-6)


def test_the_evaluation_is_plain_json_and_complete():
    result, statistics = evaluated(tokens=300)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["tokens"] == statistics.tokens == 300
    assert result["baselines"].keys() == {
        "mean_nmse", "pca_nmse", "pca_components", "untrained_nmse",
    }  # fmt: skip
    assert sum(result["density_histogram"]["latents"]) == int((statistics.count > 0).sum())
    assert result["nmse"] != result["baselines"]["untrained_nmse"]
    table = suite.format_table(result)
    assert f"{result['nmse']:.4f}" in table and f"{result['baselines']['pca_nmse']:.4f}" in table


def test_figures_that_are_not_finite_or_no_data_are_errors():
    with pytest.raises(ValueError, match=r"evaluation\.recovery\.mmcs: nan"):
        suite.plain({"recovery": {"mmcs": float("nan")}})
    with pytest.raises(ValueError, match="held_out: 0 activations"):
        suite.evaluate(autoencoder(), list)
    with pytest.raises(ValueError, match=r"EvaluationConfig\.batch_size: 0"):
        suite.EvaluationConfig(batch_size=0)
