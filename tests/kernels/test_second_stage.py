"""The exact top-k from sketches, against `top_k`, with sketches made by sorting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import top_k
from pallas_kernels.topk_encode import reference, second_stage

TOKENS, D, GROUP = 24, 16, 8


@functools.partial(jax.jit, static_argnums=(1, 2))
def select(sketch, n, k):
    return second_stage.select(sketch, functools.partial(latent_of, n=n), k)


def latent_of(group, position, n):
    """Strided: a group's latents are as far apart as there are groups."""
    return group + position * (n // GROUP)


def sketch_of(h_BL):
    """As a kernel makes it: the first of equals comes first, NaN is +inf."""
    h_BMG = np.asarray(h_BL).reshape(len(h_BL), GROUP, -1)
    order = np.argsort(-h_BMG, axis=1, kind="stable")
    largest, second, third = np.take_along_axis(h_BMG, order[:, :3], 1).swapaxes(0, 1)
    broken = np.isnan(h_BMG).any(1)
    values = (np.where(broken, np.inf, v) for v in (largest, second, third))
    positions = order[:, 0] + (order[:, 1] << second_stage.POSITION_BITS)
    return second_stage.Sketch(*map(jnp.asarray, values), jnp.asarray(positions, jnp.int32))


def preactivations(kind, n, seed=0):
    rng = np.random.default_rng(seed)
    shape = (TOKENS, n)
    h = {
        "random": lambda: rng.normal(size=shape),
        "tied": lambda: rng.integers(0, 3, shape),
        "tied, few high": lambda: rng.choice(4, p=[0.93, 0.04, 0.02, 0.01], size=shape),
        "all negative": lambda: -1 - rng.random(shape),
        "all equal": lambda: np.full(shape, 0.5),
        "masked": lambda: np.where(rng.random(n) < 0.9, -np.inf, rng.normal(size=shape)),
        "all masked": lambda: np.full(shape, -np.inf),
        "infinite": lambda: rng.choice([-np.inf, 0.0, np.inf], size=shape),
        "some nan": lambda: np.where(rng.random(shape) < 0.01, np.nan, rng.normal(size=shape)),
        "one group": lambda: rng.normal(size=shape) + 9 * (np.arange(n) % (n // GROUP) == 3),
    }[kind]()
    return h.astype(np.float32)


KINDS = [
    "random", "tied", "tied, few high", "all negative", "all equal", "masked", "all masked",
    "infinite", "some nan", "one group",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(256, 1), (256, 5), (256, 32), (4096, 32)])
def test_settled_tokens_are_exact(kind, n, k):
    h_BL = preactivations(kind, n)
    values, indices, unsettled = select(sketch_of(h_BL), n, k)
    want_values, want_indices = jax.jit(top_k, static_argnums=1)(h_BL, k)
    settled = ~np.asarray(unsettled)
    np.testing.assert_array_equal(values[settled], want_values[settled])
    np.testing.assert_array_equal(indices[settled], want_indices[settled])


def unsettled(h_BL, k):
    return np.asarray(select(sketch_of(h_BL), h_BL.shape[1], k)[2])


def test_few_random_tokens_are_unsettled():
    """As many as three of the top k fall into one group: k^3 g^2 / 6 n^2 of the tokens."""
    h_BL = np.random.default_rng(0).normal(size=(512, 4096)).astype(np.float32)
    expected = 32**3 * GROUP**2 / 6 / 4096**2
    assert 0.2 * expected < unsettled(h_BL, 32).mean() < 3 * expected


@pytest.mark.parametrize("select_limit", [4, 128])
def test_each_cause_is_seen(select_limit, monkeypatch):
    monkeypatch.setattr(second_stage, "_SELECT_LIMIT", select_limit)
    h_BL = np.tile(-np.arange(256, dtype=np.float32), (4, 1))
    h_BL[0, [3, 35, 67]] = 1  # three of the four largest in one group of 32
    h_BL[1, 3:8] = 1  # five equal maxima, of which four are chosen
    h_BL[2, [3, 200]] = 1, np.nan
    flags = second_stage.select(sketch_of(h_BL), functools.partial(latent_of, n=256), 4)[2]
    assert flags.tolist() == [True, True, True, False]


def test_a_third_value_below_the_answer_does_no_harm():
    h_BL = np.full((1, 256), -1.0, np.float32)
    h_BL[0, [3, 35, 67, 4, 36]] = 9, 8, 1, 7, 6  # the third of a group, above other groups' maxima
    assert not unsettled(h_BL, 4).any()


def operands(kind, n, seed=0):
    """Integers, so that sums are exact in any order."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (TOKENS, D)).astype(np.float32)
    w = rng.integers(-2, 3, (n, D)).astype(np.float32)
    b = rng.integers(-3, 4, n).astype(np.float32)
    if kind == "nan":
        x[3, 0] = np.nan
        w[5, 1] = np.nan
    if kind == "masked":
        b[rng.random(n) < 0.95] = -np.inf
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(b)


def by_sketch(x, w, b, k, tokens_per_block):
    n = len(w)

    def sketch(x_bD, b_L):
        h_bL = jnp.matmul(x_bD, w.T, precision=lax.Precision.HIGHEST)
        h_bL = jnp.where(h_bL == 0, -0.0, h_bL) + b_L
        shapes = jax.eval_shape(lambda: (h_bL[:, : n // GROUP],) * 3)
        positions = jax.ShapeDtypeStruct(shapes[0].shape, jnp.int32)
        return jax.pure_callback(sketch_of, second_stage.Sketch(*shapes, positions), h_bL)

    return second_stage.encode(
        x, w, b, k,
        sketch=sketch,
        latent_of=functools.partial(latent_of, n=n),
        tokens_per_block=tokens_per_block,
    )  # fmt: skip


def test_signed_zeros_tie():
    """Two latents at zero, the others below: no token is redone, which would hide an error."""
    x, w = jnp.zeros((TOKENS, D)), jnp.zeros((512, D))
    b = jnp.full(512, -1.0).at[jnp.array([5, 9])].set(jnp.array([-0.0, 0.0]))
    _, indices, count = by_sketch(x, w, b, 2, TOKENS)
    assert count == 0
    np.testing.assert_array_equal(indices, np.tile([5, 9], (TOKENS, 1)))


@pytest.mark.parametrize("kind", ["ties", "nan", "masked"])
@pytest.mark.parametrize("tokens_per_block", [TOKENS, 10])
def test_equals_the_reference(kind, tokens_per_block):
    x, w, b = operands(kind, 512)
    values, indices, count = jax.jit(by_sketch, static_argnums=(3, 4))(x, w, b, 6, tokens_per_block)
    want_values, want_indices, _ = reference.topk_encode(x, w, b, 6)
    np.testing.assert_array_equal(values, want_values)
    np.testing.assert_array_equal(indices, want_indices)
    assert 0 < count <= TOKENS


def test_redone_in_several_blocks(monkeypatch):
    """Every token of every block, the last one not full, and no token else."""
    monkeypatch.setattr(second_stage, "_FALLBACK_BYTES", 4 * 512 * 8)
    x, w, b = operands("ties", 512)
    want_values, want_indices, _ = reference.topk_encode(x, w, b, 6)
    wrong = -jnp.ones_like(want_values), -jnp.ones_like(want_indices)
    for chosen in ([], [2], list(range(1, 20)), list(range(TOKENS))):
        mask = np.isin(np.arange(TOKENS), chosen)
        values, indices, count = second_stage.redo(x, w, b, *wrong, jnp.asarray(mask))
        assert count == len(chosen)
        np.testing.assert_array_equal(values, np.where(mask[:, None], want_values, -1))
        np.testing.assert_array_equal(indices, np.where(mask[:, None], want_indices, -1))
