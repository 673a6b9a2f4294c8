"""The autoencoder module against its definition in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.model.normalizer import KINDS, Normalizer, measure
from saejax.model.sae import SAE, SAEConfig
from saejax.train import optim
from saejax.train.optim import OptimizerConfig
from saejax.train.state import build_state, export
from saejax.types import Latents

D, L, K = 8, 24, 4
CONFIG = SAEConfig(d_model=D, n_latents=L, k=K)


class Float64Config(SAEConfig):
    @property
    def dtype(self):
        return jnp.dtype("float64")


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    w_dec = rng.normal(size=(L, D))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    p = {
        "w_enc": w_dec + 0.1 * rng.normal(size=(L, D)),
        "w_dec": w_dec,
        "latent_bias": 0.1 * rng.normal(size=L),
        "pre_bias": 0.1 * rng.normal(size=D),
    }
    return {name: jnp.asarray(array, dtype) for name, array in p.items()}


def tokens(shape=(6, D), seed=1):
    return (2 + 3 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def make(kind="unit", config=CONFIG):
    return SAE(config, arrays(), measure(kind, tokens((50, D))))


def by_numpy(sae, x):
    """Pre-activations, dense code and reconstruction of `[B, D]`, without normalisation."""
    p = {name: np.asarray(array, np.float64) for name, array in sae.params.items()}
    h = (x - p["pre_bias"]) @ p["w_enc"].T + p["latent_bias"]
    z = np.zeros_like(h)
    kept = np.argsort(-h, axis=1, kind="stable")[:, :K]
    np.put_along_axis(z, kept, np.maximum(np.take_along_axis(h, kept, 1), 0), 1)
    return h, z, z @ p["w_dec"] + p["pre_bias"]


def dense(latents):
    values, indices = np.asarray(latents.values), np.asarray(latents.indices)
    z = np.zeros((*values.shape[:-1], L))
    np.put_along_axis(z, indices, values, -1)
    return z


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind):
    sae, x = make(kind), tokens()
    x_n, offset, scale = map(np.asarray, sae.normalizer.apply(jnp.asarray(x)))
    h, z, x_hat = by_numpy(sae, x_n)
    np.testing.assert_allclose(sae.pre_activations(x), h, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dense(sae.encode(x)), z, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sae(x), x_hat * scale + offset, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "shape", [(D,), (1, D), (6, D), (2, 3, D), (2, 1, 3, D), (0, D), (2, 0, D)]
)
def test_any_leading_dimensions(shape):
    sae, x = make(), tokens(shape)
    latents = sae.encode(x)
    assert latents.values.shape == latents.indices.shape == (*shape[:-1], K)
    assert latents.values.dtype == jnp.float32
    assert latents.indices.dtype == jnp.int32
    assert latents.offset.shape == latents.scale.shape == (*shape[:-1], 1)
    assert sae.pre_activations(x).shape == (*shape[:-1], L)
    out = sae.decode(latents)
    assert out.shape == shape
    flat = sae(x.reshape(-1, D)) if x.size else out
    np.testing.assert_allclose(out.reshape(-1, D), flat.reshape(-1, D), rtol=1e-5, atol=1e-5)


def test_latents_are_sorted_and_not_negative():
    latents = make().encode(tokens((40, D)))
    assert (np.diff(latents.values) <= 0).all()
    assert (latents.values >= 0).all()
    assert all(len(set(row)) == K for row in np.asarray(latents.indices))


def test_relu_is_a_switch():
    p = arrays() | {"latent_bias": jnp.full(L, -5.0)}
    without = dataclasses.replace(CONFIG, relu=False)
    x = tokens()
    assert not SAE(CONFIG, p, Normalizer()).encode(x).values.any()
    assert (SAE(without, p, Normalizer()).encode(x).values < 0).all()


def test_decode_takes_any_number_of_latents():
    sae, x = make(), tokens()
    latents = sae.encode(x)
    first = Latents(
        values=latents.values[:, :2],
        indices=latents.indices[:, :2],
        offset=latents.offset,
        scale=latents.scale,
    )
    rest = dataclasses.replace(latents, values=latents.values.at[:, :2].set(0.0))
    both = (
        sae.decode(first)
        + sae.decode(rest)
        - sae.decode(dataclasses.replace(latents, values=jnp.zeros_like(latents.values)))
    )
    np.testing.assert_allclose(both, sae.decode(latents), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_to_the_input_by_finite_differences(kind):
    """Float64 activations through parameters computed in float64."""
    with jax.enable_x64(True):
        config = Float64Config(d_model=D, n_latents=L, k=K)
        sae = SAE(config, arrays(np.float64), measure(kind, tokens((50, D))))
        rng = np.random.default_rng(3)
        x, away = (jnp.asarray(rng.normal(size=(3, D))) for _ in range(2))
        assert sae(x).dtype == jnp.float64

        def f(t):
            return jnp.sin(sae(x + t * away)).sum()

        step = 1e-6
        np.testing.assert_allclose(jax.grad(f)(0.0), (f(step) - f(-step)) / (2 * step), rtol=1e-6)


def test_gradient_to_one_latent_is_its_encoder_row():
    """Attribution: which input raises the strongest latent."""
    sae = make("none")
    x = jnp.asarray(tokens((D,)))
    gradient = jax.grad(lambda x: sae.encode(x).values[0])(x)
    strongest = int(sae.encode(x).indices[0])
    np.testing.assert_allclose(gradient, sae.params["w_enc"][strongest], rtol=1e-5)


def test_gradient_to_float64_input_of_a_float32_model():
    with jax.enable_x64(True):
        x = jnp.asarray(tokens(), jnp.float64)
        assert jax.grad(lambda x: make()(x).sum())(x).dtype == jnp.float64


def test_input_dtypes():
    want = make()(tokens())
    for dtype in (jnp.bfloat16, jnp.float16, np.float64):
        got = make()(tokens().astype(dtype))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=0.2)


def test_bfloat16_multiplies_and_float32_sums():
    sae = make("unit", dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
    x = tokens()
    assert sae.encode(x).values.dtype == sae(x).dtype == jnp.float32
    np.testing.assert_allclose(sae.pre_activations(x), make().pre_activations(x), atol=0.03)
    assert np.abs(sae.pre_activations(x) - make().pre_activations(x)).max() > 1e-6


def test_works_under_jit_and_as_a_pytree():
    sae, x = make(), jnp.asarray(tokens())
    np.testing.assert_allclose(jax.jit(lambda x: sae(x))(x), sae(x), rtol=1e-4, atol=1e-4)
    latents = jax.jit(sae.encode)(x)
    assert isinstance(latents, Latents)


@pytest.mark.parametrize("shape", [(6, D + 1), (D - 1,), ()])
def test_wrong_width(shape):
    for method in (make().encode, make().pre_activations, make()):
        with pytest.raises(ValueError, match=f"do not end in d_model = {D}"):
            method(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_model": 0}, "d_model = 0 must be at least 1"),
        ({"n_latents": 0}, "n_latents = 0 must be at least 1"),
        ({"k": 0}, "k = 0 must be at least 1"),
        ({"k": L + 1}, f"k = {L + 1} must not exceed n_latents = {L}"),
        ({"normalization": "batch"}, "normalization = 'batch' must be one of"),
        ({"pre_bias_init": "median"}, "pre_bias_init = 'median' must be one of"),
        ({"compute_dtype": "int8"}, "compute_dtype = 'int8' must be one of"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_parameters_must_fit():
    p = arrays() | {"w_dec": jnp.zeros((L, D + 1)), "theta": jnp.zeros(L)}
    del p["pre_bias"]
    with pytest.raises(ValueError) as caught:
        SAE(CONFIG, p, Normalizer())
    for text in (
        "w_dec: expected (24, 8), got (24, 9)",
        "pre_bias: expected (8,), got nothing",
        "theta: expected nothing, got (24,)",
    ):
        assert text in str(caught.value)
    assert "w_enc:" not in str(caught.value)


def exported(optimizer, step):
    state = build_state(arrays(), CONFIG, optimizer, 10, jnp.ones(()))
    done = jnp.asarray(step, jnp.int32)
    guard = dataclasses.replace(state.guard, updates=done)
    state = dataclasses.replace(state, step=done + 1, guard=guard)  # one step was skipped
    if state.ema is not None and step:
        ema = jax.tree.map(lambda p: 2 * p * (1 - optimizer.ema_decay**step), arrays())
        state = dataclasses.replace(state, ema=ema)
    return export(state, CONFIG, optimizer, Normalizer()).params


def test_export_corrects_the_average():
    got, last = exported(OptimizerConfig(ema_decay=0.9), 3), arrays()
    for name in ("w_enc", "latent_bias", "pre_bias"):
        np.testing.assert_allclose(got[name], 2 * last[name], rtol=1e-5)
    np.testing.assert_allclose(got["w_dec"], last["w_dec"], rtol=1e-5)  # unit norm again
    loose = exported(OptimizerConfig(ema_decay=0.9, unit_norm_decoder=False), 3)
    np.testing.assert_allclose(loose["w_dec"], 2 * last["w_dec"], rtol=1e-5)


def test_export_without_an_average():
    for optimizer, step in ((OptimizerConfig(ema_decay=None), 3), (OptimizerConfig(), 0)):
        got = exported(optimizer, step)
        for name, want in arrays().items():
            np.testing.assert_array_equal(got[name], want)


def test_average_of_constant_weights_is_the_weights():
    ema = jax.tree.map(jnp.zeros_like, arrays())
    for _ in range(3):
        ema = optim.update_ema(ema, arrays(), 0.999)
    for name, got in optim.corrected_ema(ema, 0.999, 3).items():
        np.testing.assert_allclose(got, arrays()[name], rtol=1e-4)
