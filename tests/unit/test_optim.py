"""Learning rate, projection, clipping and averages."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saejax.train import optim
from saejax.train.optim import OptimizerConfig

STEPS = 100


def rates(steps=range(STEPS), **options):
    schedule = OptimizerConfig(learning_rate=2.0, **options).schedule(64, STEPS)
    return [float(schedule(jnp.asarray(step))) for step in steps]


@pytest.mark.parametrize(
    "log2_latents, rate", [(14, 2e-4), (15, 1.4e-4), (17, 7.1e-5), (20, 2.5e-5), (24, 6.25e-6)]
)
def test_rule_of_the_square_root(log2_latents, rate):
    got = OptimizerConfig().resolve_learning_rate(2**log2_latents)
    assert got == pytest.approx(rate, rel=0.02)
    assert OptimizerConfig(learning_rate=3e-4).resolve_learning_rate(2**log2_latents) == 3e-4


def test_constant_is_the_default():
    assert rates() == [2.0] * STEPS


def test_warmup_is_linear():
    got = rates(warmup_steps=4)
    np.testing.assert_allclose(got[:6], [0.4, 0.8, 1.2, 1.6, 2.0, 2.0], rtol=1e-6)


def test_linear_decay_falls_to_zero_over_its_share():
    got = rates(range(STEPS + 1), decay="linear", decay_fraction=0.2)
    assert got[:81] == [2.0] * 81
    np.testing.assert_allclose(got[80:], np.linspace(2, 0, 21), rtol=1e-5, atol=1e-6)


def test_cosine_decay():
    got = rates(range(STEPS + 1), decay="cosine", decay_fraction=0.5)
    np.testing.assert_allclose(got[50:], 1 + np.cos(np.linspace(0, np.pi, 51)), atol=1e-5)
    assert got[:51] == [2.0] * 51


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("decay", "exponential"),
        ("decay_fraction", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", 0.0),
        ("clip_norm", 0.0),
        ("clip_norm", float("inf")),
        ("ema_decay", 1.0),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value!r} must be"):
        OptimizerConfig(**{field: value})


def test_projection_leaves_what_is_orthogonal():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)  # the rows need not be unit vectors
    g = {name: jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for name in ("w_dec", "w_enc")}
    got = optim.project_decoder_gradient(g, {"w_dec": w})
    np.testing.assert_allclose((got["w_dec"] * w).sum(1), 0, atol=1e-5)
    removed = np.asarray(g["w_dec"] - got["w_dec"])
    cosine = (removed * w).sum(1) / np.linalg.norm(removed, axis=1) / np.linalg.norm(w, axis=1)
    np.testing.assert_allclose(np.abs(cosine), 1, rtol=1e-5)
    assert got["w_enc"] is g["w_enc"]


def first_update(clip_norm, gradient):
    tx = OptimizerConfig(learning_rate=0.1, clip_norm=clip_norm, epsilon=1.0).transformation(4, 10)
    updates, _ = tx.update(gradient, tx.init(gradient))
    return updates["w"]


def test_clipping_scales_to_the_norm_and_no_further():
    gradient = {"w": jnp.asarray([3.0, 4.0])}
    # Adam's first step is -rate * g / (|g| + epsilon), here with an epsilon of one.
    np.testing.assert_allclose(first_update(None, gradient), [-0.075, -0.08], rtol=1e-5)
    np.testing.assert_allclose(first_update(10.0, gradient), [-0.075, -0.08], rtol=1e-5)
    clipped = -0.1 * np.array([0.6 / 1.6, 0.8 / 1.8])
    np.testing.assert_allclose(first_update(1.0, gradient), clipped, rtol=1e-5)


def test_defaults_are_adam_as_in_the_paper():
    rng = np.random.default_rng(0)
    gradient = {"w": jnp.asarray(rng.normal(size=5) * 1e-9, jnp.float32)}
    tx = OptimizerConfig().transformation(2**14, 10)
    want_tx = optax.adam(2e-4, b1=0.9, b2=0.999, eps=6.25e-10)
    got, _ = tx.update(gradient, tx.init(gradient))
    want, _ = want_tx.update(gradient, want_tx.init(gradient))
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)


def test_unit_norm():
    w = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    got = optim.renormalize_decoder({"w_dec": w, "w_enc": w})
    np.testing.assert_allclose(got["w_dec"], [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert got["w_enc"] is w


def test_corrected_average():
    ema, values = {"w": jnp.zeros(2)}, [1.0, 2.0, 4.0]
    for value in values:
        ema = optim.update_ema(ema, {"w": jnp.full(2, value)}, 0.9)
    weights = 0.9 ** np.arange(2, -1, -1)
    want = weights @ values / weights.sum()
    np.testing.assert_allclose(optim.corrected_ema(ema, 0.9, 3)["w"], want, rtol=1e-6)
    with pytest.raises(ValueError, match="updates = 0"):
        optim.corrected_ema(ema, 0.9, 0)
