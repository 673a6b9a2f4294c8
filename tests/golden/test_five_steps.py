"""Five real training steps against an independent numpy implementation of the recipe, in float64.

Every parameter, Adam moment, running average, dead counter and metric is compared after every step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train import guard
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.state import export
from saejax.train.step import jit_step, make_step
from saejax.types import TrainState
from tests.golden import numpy_recipe

D, L, K, B, STEPS = 10, 40, 3, 16, 5
VARIANCE = 0.87
RELATIVE = 1e-10
CLIP = 2.0
TIED = [2, 7, 18, 31]


class Float64Config(SAEConfig):
    """The model computed in float64, which no user needs and an oracle does."""

    def dtype_on(self, platform):
        return jnp.dtype("float64")


def initial_params():
    """Encoder near parallel to the decoder; four latents on three shards that tie exactly."""
    rng = np.random.default_rng(0)
    w_dec = rng.normal(size=(L, D))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    params = {
        "w_enc": 0.7 * w_dec + 0.1 * rng.normal(size=(L, D)),
        "w_dec": w_dec,
        "latent_bias": 0.05 * rng.normal(size=L),
        "pre_bias": 0.1 * rng.normal(size=D),
    }
    # A zero row ignores the input, so these pre-activations are equal whatever the order of sums.
    params["w_enc"][TIED], params["latent_bias"][TIED] = 0, 0.5
    return params


def batches():
    """Clusters that change from step to step: latents fall silent and are called back."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(2, D))
    which = (0, 0, 0, 1, 1)
    return [3 + centres[c] + rng.normal(size=(B, D)) for c in which]


CASES = {
    "every option on": (
        LossConfig(k_aux=8, dead_tokens=2 * B, multi_topk_coefficient=1 / 8),
        OptimizerConfig(
            learning_rate=0.02,
            warmup_steps=2,
            decay="cosine",
            decay_fraction=0.6,
            clip_norm=CLIP,
            ema_decay=0.9,
        ),
        numpy_recipe.Recipe(
            k=K,
            k_aux=8,
            variance=VARIANCE,
            learning_rate=0.02,
            steps=STEPS,
            k_multi=4 * K,
            multi=1 / 8,
            dead_tokens=2 * B,
            warmup_steps=2,
            cosine_share=0.6,
            clip=CLIP,
            ema=0.9,
        ),
    ),
    "defaults": (
        LossConfig(),
        OptimizerConfig(),
        numpy_recipe.Recipe(
            k=K, k_aux=4, variance=VARIANCE, learning_rate=2e-4 * (2**14 / L) ** 0.5, steps=STEPS
        ),
    ),
}


def oracle_history(case: str) -> list[tuple[np.ndarray, dict[str, float]]]:
    """The oracle's dead counters and metrics after each step, on its own."""
    run = numpy_recipe.Run(CASES[case][2], initial_params())
    history = []
    for x in batches():
        metrics = run.step(x)
        history.append((run.silent_tokens.copy(), metrics))
    return history


def start(optimizer: OptimizerConfig) -> TrainState:
    params = jax.tree.map(jnp.asarray, initial_params())
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.transformation(L, STEPS).init(params),
        ema=jax.tree.map(jnp.zeros_like, params),
        tokens_since_fired=jnp.zeros(L, jnp.int32),
        variance=jnp.float64(VARIANCE),
        guard=guard.fresh(),
    )


def assert_same(got, want, what):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, what
    tolerance = RELATIVE * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=what)


def assert_same_state(state: TrainState, run: numpy_recipe.Run):
    (adam,) = [s for s in state.opt_state if hasattr(s, "mu")]
    for name in numpy_recipe.NAMES:
        where = f"{name} after step {run.steps_done}"
        assert state.params[name].dtype == jnp.float64
        assert_same(state.params[name], run.params[name], where)
        assert_same(adam.mu[name], run.mu[name], f"Adam's mean of {where}")
        assert_same(adam.nu[name], run.nu[name], f"Adam's square of {where}")
        assert_same(state.ema[name], run.ema[name], f"EMA of {where}")
    np.testing.assert_array_equal(state.tokens_since_fired, run.silent_tokens)


def assert_same_metrics(metrics, want: dict[str, float]):
    for name in ("squared_error", "multi_squared_error", "auxk", "grad_norm"):
        np.testing.assert_allclose(
            getattr(metrics, name), want[name], rtol=RELATIVE, atol=1e-14, err_msg=name
        )
    # The schedule is computed in float32 on purpose; the update takes it from there.
    np.testing.assert_allclose(metrics.learning_rate, want["learning_rate"], rtol=1e-6)
    assert int(metrics.active) == want["active"]
    assert int(metrics.dead) == want["dead"]
    assert int(metrics.tokens) == B
    assert int(metrics.auxk_skipped) == 0


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("case", CASES)
def test_five_steps_equal_the_numpy_recipe(case, mesh_shape):
    loss, optimizer, recipe = CASES[case]
    config = Float64Config(d_model=D, n_latents=L, k=K)
    with jax.enable_x64(True):
        mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(*mesh_shape))
        step = make_step(
            config,
            loss,
            optimizer,
            TopKConfig(capacity_factor=None),
            Normalizer(),
            mesh,
            batch_tokens=B,
            chunks=2,
            steps=STEPS,
        )
        state = start(optimizer)
        state = jax.device_put(state, mesh_lib.tree_shardings(mesh, state))
        step = jit_step(step, state, mesh)
        run = numpy_recipe.Run(recipe, initial_params())
        for x in batches():
            state, metrics = jax.block_until_ready(step(state, jnp.asarray(x)))
            want = run.step(x, learning_rate=float(metrics.learning_rate))
            assert_same_metrics(metrics, want)
            assert_same_state(state, run)
        assert int(state.step) == STEPS
        model = export(state, config, optimizer, Normalizer())
        corrected = run.corrected_ema()
        corrected["w_dec"] /= np.linalg.norm(corrected["w_dec"], axis=1, keepdims=True)
        for name in numpy_recipe.NAMES:
            assert_same(model.params[name], corrected[name], f"exported {name}")


def test_the_problem_exercises_what_it_should():
    history = oracle_history("every option on")
    dead = [silent >= 2 * B for silent, _ in history]
    revived = sum((before & (silent == 0)).sum() for before, (silent, _) in zip(dead, history[1:]))
    assert not dead[0].any(), "nothing may be dead at first"
    assert sum(d.any() for d in dead) >= 3, "dead latents must appear"
    assert revived >= 3, "dead latents must come alive"
    norms = [metrics["grad_norm"] for _, metrics in history]
    assert max(norms) > CLIP > min(norms), "some steps must be clipped, others not"
    assert len({metrics["learning_rate"] for _, metrics in history}) >= 4
    assert all(metrics["auxk"] > 0 for _, metrics in history[1:])
    assert all(metrics["auxk"] == 0 for _, metrics in oracle_history("defaults"))


def test_the_problem_holds_exact_ties():
    params = initial_params()
    x = batches()[0]
    x = x - x.mean(1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    h = (x - params["pre_bias"]) @ params["w_enc"].T + params["latent_bias"]
    kept = (numpy_recipe.relu_top_k(h, K) > 0)[:, TIED]
    assert (np.diff(kept.astype(int), axis=1) <= 0).all(), "ties go to the lowest index"
    assert len(set(kept.sum(1))) > 1, "the last places must be tied for on some tokens"
