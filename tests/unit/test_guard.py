"""The divergence guard: what it skips, what a skipped step leaves alone, and what it remembers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train import guard
from saejax.train.guard import WINDOW, GuardConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import KernelConfig
from saejax.train.state import create, export
from saejax.train.step import jit_step, make_step

D, L, K, B = 8, 32, 3, 16
SAE = SAEConfig(d_model=D, n_latents=L, k=K)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, ema_decay=0.9, decay="linear", decay_fraction=0.5)
GUARD = GuardConfig(after_steps=3, window=8)


# --- The judgement --------------------------------------------------------------------------------


def judged(values, config=GUARD, norms=None):
    """Which of these losses were accepted, and the state at the end."""
    state, accepted = guard.fresh(), []
    judge = jax.jit(functools.partial(guard.judge, config=config))
    for loss, norm in zip(values, norms or [1.0] * len(values)):
        pair = jnp.float32(loss), jnp.float32(norm)
        accept = judge(state, *pair)
        state = jax.jit(guard.record)(state, accept, *pair)
        accepted.append(bool(accept))
    return accepted, jax.device_get(state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_accepted(bad):
    config = GuardConfig(spike_deviations=None)
    accepted, state = judged([bad, 1, bad, bad], config)
    assert accepted == [False, True, False, False]
    assert (state.updates, state.skipped_in_a_row) == (1, 2)
    assert judged([1, 1], config, norms=[1, bad])[0] == [True, False]


def test_spikes_are_looked_for_after_some_steps():
    assert judged([1, 1, 100, 1, 1])[0] == [True] * 5
    assert judged([1, 1, 1, 100, 1])[0] == [True, True, True, False, True]
    assert judged([1, 1, 1, 1], norms=[1, 1, 1, 100])[0][-1] is False
    assert judged([1, 1, 1, 1e30], GuardConfig(spike_deviations=None))[0] == [True] * 4


def test_a_spike_is_above_the_deviations_and_above_the_ratio():
    calm = [1.0, 1.01, 0.99, 1.0]
    assert judged([*calm, 1.9])[0][-1] and not judged([*calm, 2.1])[0][-1]
    config = dataclasses.replace(GUARD, spike_ratio=1.0)
    assert judged([*calm, 1.03], config)[0][-1] and not judged([*calm, 1.2], config)[0][-1]
    wild = [1.0, 9.0, 1.0, 9.0]  # mean 5, deviation 4
    assert judged([*wild, 28])[0][-1] and not judged([*wild, 30])[0][-1]


def test_the_window_forgets_and_skipped_steps_are_not_in_it():
    high, low = [100.0] * 20, [1.0] * 8
    assert not judged([*high, *low, 50])[0][-1], "only the newest 8 count"
    assert judged([*high, *low[:4], 50])[0][-1]
    accepted, state = judged([1, 1, 1, 1000, 1000, 1000, 1])
    assert accepted == [True] * 3 + [False] * 3 + [True]
    assert state.updates == 4 and state.recent[0].max() == 1


def test_the_whole_window_is_remembered():
    values = np.random.default_rng(0).uniform(1, 1.5, 3 * WINDOW + 5)
    accepted, state = judged(values, GuardConfig())
    assert all(accepted) and state.updates == len(values)
    np.testing.assert_array_equal(np.sort(state.recent[0]), np.sort(np.float32(values[-WINDOW:])))


def test_a_loss_of_zero_has_no_spikes():
    assert judged([0, 0, 0, 1e-9], norms=[0, 0, 0, 1e-9])[0] == [True] * 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("window", 1, r"window = 1 must lie in \[2, 128\]"),
        ("window", 129, r"window = 129 must lie in \[2, 128\]"),
        ("spike_deviations", 0.0, "spike_deviations = 0.0 must be positive, or None"),
        ("spike_ratio", 0.5, "spike_ratio = 0.5 must be at least 1"),
        ("after_steps", 1, "after_steps = 1 must be at least 2"),
        ("rollback_after", 0, "rollback_after = 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**{field: value})


# --- The step -------------------------------------------------------------------------------------


def batch(seed):
    return np.random.default_rng(seed).normal(size=(B, D)).astype(np.float32)


def bad_batch():
    x = batch(5)
    x[3, 2] = np.nan
    return x


@functools.cache
def step_of(gradients, shape, clip):
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(*shape))
    optimizer = dataclasses.replace(OPTIMIZER, clip_norm=clip)
    normalizer = Normalizer(kind="none")
    parts = (SAE, LossConfig(k_aux=4, dead_tokens=2 * B), optimizer, TopKConfig(), normalizer)
    kernels = KernelConfig(gradients=gradients)
    sizes = {"batch_tokens": B, "chunks": 1, "steps": 10}
    step = make_step(*parts, mesh, **sizes, kernels=kernels, guard=GUARD)
    fresh = functools.partial(create, 0, SAE, optimizer, 10, batch(99), mesh)
    return jit_step(step, fresh(), mesh), fresh


def train(batches, gradients="sparse", shape=(1, 1), clip=None, change=lambda state: state):
    """States after every step, on the host, the fresh one first, and metrics."""
    step, fresh = step_of(gradients, shape, clip)
    state = change(fresh())
    states, seen = [jax.device_get(state)], []
    for x in batches:
        state, metrics = step(state, jnp.asarray(x))
        states.append(jax.device_get(state))
        seen.append(jax.device_get(metrics))
    return states, seen


def kept(state):
    """What a skipped step leaves alone."""
    adam = [s for s in state.opt_state if hasattr(s, "mu")]
    return (state.params, adam, state.ema, state.tokens_since_fired, state.guard.recent)


def assert_same_bits(a, b):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


CASES = [("sparse", (1, 1), None), ("sparse", (2, 4), 0.1), ("dense", (1, 1), None)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_a_skipped_step_changes_nothing_but_the_count_of_steps(case, kind):
    bad = bad_batch() if kind == "nan" else 100 * batch(5)
    states, seen = train([*map(batch, range(4)), bad, batch(7)], *case)
    before, after, last = states[4:]
    assert_same_bits(kept(before), kept(after))
    assert [int(m.skipped) for m in seen] == [0, 0, 0, 0, 1, 0]
    assert [int(m.skipped_in_a_row) for m in seen] == [0, 0, 0, 0, 1, 0]
    assert (after.step, after.guard.updates, after.guard.skipped_in_a_row) == (5, 4, 1)
    assert (last.step, last.guard.updates, last.guard.skipped_in_a_row) == (6, 5, 0)
    assert seen[4].grad_norm > 10 or not np.isfinite(seen[4].grad_norm), "it is told as it was"


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_if_the_step_had_not_been(case):
    """But for the learning rate, which follows the position in the schedule."""
    skipped, seen = train([batch(0), batch(1), bad_batch(), batch(2)], *case)
    without, _ = train([batch(0), batch(1), batch(2)], *case)
    rates = [m.learning_rate for m in seen]
    assert rates[2] == rates[3] == np.float32(1e-2), "the schedule is flat here"
    for name in ("params", "ema"):
        for a, b in zip(*(jax.tree.leaves(getattr(s[-1], name)) for s in (skipped, without))):
            np.testing.assert_array_equal(a, b)
    one, other = (export(s[-1], SAE, OPTIMIZER, Normalizer()) for s in (skipped, without))
    np.testing.assert_array_equal(one.params["w_dec"], other.params["w_dec"])
    parts = skipped[-1].opt_state
    counts = [int(part.count) for part in parts if "count" in getattr(part, "_fields", ())]
    assert counts == [3, 4], "Adam counts updates, the schedule steps"


def test_bad_weights_skip_every_step_and_are_left_as_they_are():
    def change(state):
        w_enc = state.params["w_enc"].at[3].set(np.nan)
        return dataclasses.replace(state, params=state.params | {"w_enc": w_enc})

    states, seen = train([batch(0), batch(1), batch(2)], change=change)
    assert [int(m.skipped_in_a_row) for m in seen] == [1, 2, 3]
    assert_same_bits(kept(states[0]), kept(states[-1]))
    assert not guard.all_finite(states[-1].params) and guard.all_finite(states[-1].opt_state)


def test_the_update_is_a_branch_and_copies_no_matrix():
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape())
    sae = SAEConfig(d_model=64, n_latents=1000, k=3)  # sizes that nothing else has
    parts = (sae, LossConfig(k_aux=4), OPTIMIZER, TopKConfig(), Normalizer(), mesh)
    step = make_step(*parts, batch_tokens=B, chunks=1, steps=10)
    x = np.random.default_rng(0).normal(size=(B, 64)).astype(np.float32)
    state = create(0, sae, OPTIMIZER, 10, x, mesh)
    text = jit_step(step, state, mesh).lower(state, jnp.asarray(x)).compile().as_text()
    branches = text.split("\n\n")
    copying = [b for b in branches if re.search(r"f32\[1000,64\]\S* copy\(", b)]
    assert "conditional(" in text
    assert not [b for b in copying if "sqrt" in b], "a branch that updates copies what it updates"
