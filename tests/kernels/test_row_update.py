"""The optimizer's work on rows against numpy, alone and after the weight gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk

IMPLEMENTATIONS = ["xla", "reference"]


def updated_by_numpy(w, g, mu, nu, ema, rate, step, scale, s):
    """The equations of Adam and of Gao et al. 2024, App. A, row by row."""
    out = []
    for row in range(len(w)):
        u, gradient = w[row], g[row]
        length = np.sqrt(u @ u) or 1.0
        if s.project:
            gradient = gradient - (gradient @ u) / length * (u / length)
        first = s.beta1 * mu[row] + (1 - s.beta1) * scale * gradient
        second = s.beta2 * nu[row] + (1 - s.beta2) * (scale * gradient) ** 2
        mean, spread = first / (1 - s.beta1**step), second / (1 - s.beta2**step)
        new = u - rate * mean / (np.sqrt(spread) + s.epsilon)
        if s.unit_norm:
            new = new / (np.sqrt(new @ new) or 1.0)
        average = s.ema_decay * ema[row] + (1 - s.ema_decay) * new if s.ema_decay else new
        out.append((new, first, second, average, gradient @ gradient))
    return [np.stack(field) for field in zip(*out, strict=True)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("project, unit_norm, ema_decay", [(1, 1, 0.9), (0, 0, None), (1, 0, 0.5)])
def test_row_update(project, unit_norm, ema_decay, implementation):
    rng = np.random.default_rng(0)
    w, g, mu, nu, ema = (rng.normal(size=(7, 5)) for _ in range(5))
    nu, w[3] = np.abs(nu), 0
    g[3] = mu[3] = 0  # a row of nothing stays nothing
    settings_ = pk.RowSettings(
        beta1=0.9,
        beta2=0.99,
        epsilon=1e-8,
        ema_decay=ema_decay,
        project=bool(project),
        unit_norm=bool(unit_norm),
    )
    with jax.enable_x64(True):
        scalars = pk.RowScalars(jnp.asarray(0.1), jnp.asarray(3, jnp.int32), jnp.asarray(0.7))
        got = pk.row_update(
            w,
            g,
            mu,
            nu,
            ema if ema_decay else None,
            scalars,
            settings=settings_,
            copy_dtype=jnp.bfloat16,
            implementation=implementation,
        )
    want = updated_by_numpy(w, g, mu, nu, ema, 0.1, 3, 0.7, settings_)
    fields = (got.w_LD, got.mu_LD, got.nu_LD, got.ema_LD, got.squared_norm_L)
    for one, other in zip(fields, want, strict=True):
        if one is not None:
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
    assert (got.ema_LD is None) == (ema_decay is None)
    np.testing.assert_array_equal(got.copy_LD, got.w_LD.astype(jnp.bfloat16))


def test_the_composed_update_is_its_parts():
    rng = np.random.default_rng(0)
    values = np.float32(rng.normal(size=(12, 3)))
    indices = rng.integers(0, 20, (12, 3)).astype(np.int32)
    e, x, *state = (np.float32(rng.normal(size=s)) for s in [(12, 8)] * 2 + [(20, 8)] * 8)
    dec, enc = pk.Rows(*state[:4]), pk.Rows(*state[4:])
    dec, enc = (rows._replace(nu_LD=np.abs(rows.nu_LD)) for rows in (dec, enc))
    scalars = pk.RowScalars(jnp.float32(0.1), jnp.int32(2), jnp.float32(1))
    plain = pk.RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, ema_decay=0.9)
    unit = pk.RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, ema_decay=0.9, unit_norm=True)
    got = pk.weight_grads_update(
        values, values, indices, e, x, dec, enc, scalars, dec_settings=unit, enc_settings=plain
    )
    g = pk.weight_grads(values, values, indices, e, x, 20)
    for rows, gradient, how, done in (
        (dec, g.w_dec_LD, unit, got.dec),
        (enc, g.w_enc_LD, plain, got.enc),
    ):
        w, mu, nu, ema = rows
        want = pk.row_update(w, gradient, mu, nu, ema, scalars, settings=how)
        for one, other in zip(jax.tree.leaves(done), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(got.latent_bias_L, g.latent_bias_L)


def test_scalars_do_not_widen_a_matrix():
    settings_ = pk.RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8)
    with jax.enable_x64(True):
        w = jnp.ones((2, 3), jnp.float32)
        scalars = pk.RowScalars(jnp.float64(0.1), jnp.int64(1), jnp.float64(1))
        done = pk.row_update(w, w, w, w, None, scalars, settings=settings_)
    assert {array.dtype for array in jax.tree.leaves(done)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scalars_may_be_numbers(implementation):
    settings_ = pk.RowSettings(beta1=0.9, beta2=0.99, epsilon=1e-8)
    w, how = jnp.ones((2, 3)), {"settings": settings_, "implementation": implementation}
    arrays = pk.RowScalars(jnp.float32(0.1), jnp.int32(2), jnp.float32(0.5), jnp.asarray(True))
    want = pk.row_update(w, w, w, w, None, arrays, **how)
    for numbers in (pk.RowScalars(0.1, 2, 0.5, True), pk.RowScalars(np.float64(0.1), 2, 0.5, True)):
        got = pk.row_update(w, w, w, w, None, numbers, **how)
        jax.tree.map(np.testing.assert_array_equal, got, want)
