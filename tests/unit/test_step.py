"""The training step: its switches, its counters, and what it does with bad numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import explain
from pallas_kernels.topk_encode import xla as encode_xla
from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.model import sparse
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import KernelConfig, bytes_over_data, loss_spec
from saejax.train.state import abstract_state, create
from saejax.train.step import auxk_block_tokens, auxk_capacities, jit_step, make_step

D, L, K, B = 8, 32, 3, 16
SAE = SAEConfig(d_model=D, n_latents=L, k=K)
LOSS = LossConfig(k_aux=4, dead_tokens=2 * B)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, ema_decay=0.9)


def batch(seed):
    return np.random.default_rng(seed).normal(size=(B, D)).astype(np.float32)


@functools.cache
def compiled(sae, loss, optimizer, normalizer):
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape())
    step = make_step(
        sae, loss, optimizer, TopKConfig(), normalizer, mesh, batch_tokens=B, chunks=1, steps=10
    )
    return jit_step(step, abstract_state(sae, optimizer, 10), mesh)


def train(batches, sae=SAE, loss=LOSS, optimizer=OPTIMIZER, normalizer=None, change=None):
    """State on the host and metrics of every step; `change` edits the fresh state."""
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape())
    state = create(0, sae, optimizer, 10, batch(99), mesh)
    if change is not None:
        state = change(state)
    step, history = compiled(sae, loss, optimizer, normalizer or Normalizer()), []
    for x in batches:
        state, metrics = step(state, jnp.asarray(x))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def silenced(state, rows=slice(0, None, 2), tokens=1000):
    """Every other latent unable to fire for long."""
    bias = state.params["latent_bias"].at[rows].set(-9.0)
    since = state.tokens_since_fired.at[rows].set(tokens)
    return dataclasses.replace(
        state, params=state.params | {"latent_bias": bias}, tokens_since_fired=since
    )


def test_the_second_call_does_not_compile():
    step = compiled(SAE, LOSS, OPTIMIZER, Normalizer())
    train([batch(0), batch(1), batch(2)])
    assert step._cache_size() == 1


def test_one_step_reports_what_it_did():
    state, (metrics,) = train([batch(0)])
    assert int(state.step) == 1
    assert metrics.tokens == B
    assert metrics.active == B * K
    assert metrics.multi_squared_error == 0
    assert metrics.learning_rate == np.float32(1e-2)
    assert metrics.grad_norm > 0
    np.testing.assert_allclose(np.linalg.norm(state.params["w_dec"], axis=1), 1, rtol=1e-5)


def test_training_lowers_the_error():
    _, history = train([batch(0)] * 10)
    assert history[-1].squared_error < 0.8 * history[0].squared_error


def test_dead_counters_count_tokens():
    state, (metrics,) = train([batch(0)])
    fired = state.tokens_since_fired == 0
    assert 0 < fired.sum() < L
    assert (state.tokens_since_fired[~fired] == B).all()
    assert metrics.dead == 0
    state, history = train([batch(0), batch(0)], loss=dataclasses.replace(LOSS, dead_tokens=B + 1))
    assert history[0].dead == 0
    assert history[1].dead == (state.tokens_since_fired > B).sum() > 0


def test_dead_counters_saturate():
    state, _ = train([batch(0)] * 2, change=lambda s: silenced(s, tokens=2**30 + 3))
    largest = state.tokens_since_fired.max()
    assert 2**30 < largest < 2**30 + 3 * B, "neither wrapped around nor reset"


def test_auxk_is_off_while_nothing_is_dead():
    with_auxk, (metrics,) = train([batch(0)])
    without, _ = train([batch(0)], loss=dataclasses.replace(LOSS, auxk_coefficient=0.0))
    assert metrics.dead == metrics.auxk == metrics.auxk_skipped == 0
    for name, want in without.params.items():
        np.testing.assert_allclose(with_auxk.params[name], want, rtol=1e-6, atol=1e-7)


def lifted(state):
    """As `silenced`, but dead latents see the input: their bias is a little low only."""
    state = silenced(state)
    bias = state.params["latent_bias"].at[::2].set(-0.3)
    return dataclasses.replace(state, params=state.params | {"latent_bias": bias})


def test_auxk_moves_dead_latents_and_only_it():
    fresh = jax.device_get(lifted(create(0, SAE, OPTIMIZER, 10, batch(99), make_mesh())))
    on, (metrics,) = train([batch(0)], change=lifted)
    off, _ = train([batch(0)], loss=dataclasses.replace(LOSS, auxk_coefficient=0.0), change=lifted)
    dead = on.tokens_since_fired > 0
    assert metrics.auxk > 0
    assert metrics.dead >= 5
    moved_on = np.abs(on.params["w_enc"] - fresh.params["w_enc"]).max(1)[dead]
    moved_off = np.abs(off.params["w_enc"] - fresh.params["w_enc"]).max(1)[dead]
    assert (moved_off == 0).all()
    assert (moved_on > 1e-4).sum() >= 3


def make_mesh():
    return mesh_lib.make_mesh(mesh_lib.MeshShape())


@pytest.mark.parametrize("value", [1.0, 0.1])
def test_auxk_without_spread_is_replaced_and_counted(value):
    """The same token throughout: its residual has no spread, exactly (1.0) or but for rounding."""
    x = np.tile(value * np.linspace(1, 2, D, dtype=np.float32), (B, 1))
    x = np.tile(np.eye(1, D, dtype=np.float32), (B, 1)) if value == 1.0 else x
    loss = dataclasses.replace(LOSS, auxk_coefficient=1.0)
    state, (metrics,) = train([x], loss=loss, normalizer=Normalizer(kind="none"), change=exact)
    off, _ = train(
        [x],
        loss=dataclasses.replace(LOSS, auxk_coefficient=0.0),
        normalizer=Normalizer(kind="none"),
        change=exact,
    )
    assert metrics.dead > 0
    assert metrics.auxk_skipped == 1
    assert metrics.auxk == 0
    for name, want in off.params.items():
        assert np.isfinite(state.params[name]).all()
        np.testing.assert_allclose(state.params[name], want, rtol=1e-6, atol=1e-7)


def exact(state):
    """Nothing fires, so that e = x exactly."""
    bias = jnp.full(L, -9.0)
    params = state.params | {"latent_bias": bias, "pre_bias": jnp.zeros(D)}
    return dataclasses.replace(
        state, params=params, tokens_since_fired=jnp.full(L, 1000, jnp.int32)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_input_surfaces_in_the_error(bad):
    x = batch(0)
    x[3, 2] = bad
    _, (metrics,) = train([x])
    assert not np.isfinite(metrics.squared_error)


def test_nan_in_a_weight_surfaces_in_the_error():
    """Whatever the sign bit: arithmetic on x86 makes negative NaNs."""

    def change(state):
        nan = np.array([0xFFC00000], np.uint32).view(np.float32)[0]
        w_enc = state.params["w_enc"].at[5].set(nan)
        return dataclasses.replace(state, params=state.params | {"w_enc": w_enc})

    _, (metrics,) = train([batch(0)], change=change)
    assert np.isnan(metrics.squared_error)


def test_latent_bias_stays_zero_when_it_is_off():
    two = [batch(0), batch(1)]
    state, _ = train(two, sae=dataclasses.replace(SAE, latent_bias=False))
    assert not state.params["latent_bias"].any()
    assert np.abs(train(two)[0].params["latent_bias"]).max() > 1e-3


def changed(state, other):
    return {
        name for name in state.params
        if np.abs(state.params[name] - other.params[name]).max() > 1e-5
    }  # fmt: skip


def test_projection_and_unit_norm_are_switches():
    two = [batch(0), batch(1)]
    plain, _ = train(two)
    no_projection, history = train(
        two, optimizer=dataclasses.replace(OPTIMIZER, project_decoder_gradient=False)
    )
    assert "w_dec" in changed(plain, no_projection)
    assert history[0].grad_norm > train(two)[1][0].grad_norm
    free, _ = train(two, optimizer=dataclasses.replace(OPTIMIZER, unit_norm_decoder=False))
    assert np.abs(np.linalg.norm(free.params["w_dec"], axis=1) - 1).max() > 1e-5


def test_clipping_is_a_switch_and_the_reported_norm_is_not_clipped():
    plain, before = train([batch(0), batch(1)])
    clipped, after = train(
        [batch(0), batch(1)], optimizer=dataclasses.replace(OPTIMIZER, clip_norm=1e-3)
    )
    assert after[0].grad_norm == pytest.approx(before[0].grad_norm, rel=1e-5)
    assert changed(plain, clipped)
    (adam,) = [s for s in clipped.opt_state if hasattr(s, "mu")]
    norm = np.sqrt(sum(np.square(m).sum() for m in jax.tree.leaves(adam.mu)))
    assert norm <= 1e-3


def test_multi_topk_and_relu_are_switches():
    plain, (metrics,) = train([batch(0)])
    multi, (wide,) = train([batch(0)], loss=dataclasses.replace(LOSS, multi_topk_coefficient=1 / 8))
    assert wide.multi_squared_error > 0
    assert wide.squared_error == pytest.approx(metrics.squared_error, rel=1e-6)
    assert changed(plain, multi)

    low = dataclasses.replace(SAE, relu=False)
    _, (negative,) = train([batch(0)], sae=low, change=exact)
    _, (clamped,) = train([batch(0)], change=exact)
    assert clamped.active == 0
    assert negative.active == B * K


def test_average_is_a_switch():
    state, _ = train([batch(0)])
    for name, ema in state.ema.items():
        np.testing.assert_allclose(ema, 0.1 * state.params[name], rtol=1e-4, atol=1e-7)
    without, _ = train([batch(0)], optimizer=dataclasses.replace(OPTIMIZER, ema_decay=None))
    assert without.ema is None
    assert not changed(state, without)


def test_normalization_is_applied():
    _, (plain,) = train([batch(0)])
    _, (scaled,) = train([5 * batch(0) + 3])
    assert scaled.squared_error == pytest.approx(plain.squared_error, rel=1e-3)
    _, (raw,) = train([batch(0)], normalizer=Normalizer(kind="none"))
    assert raw.squared_error > 2 * plain.squared_error


@pytest.mark.parametrize(
    "d_model, n_latents, k_aux",
    [(768, 32768, 512), (12288, 2**24, 8192), (64, 4096, 32), (256, 4096, 128), (64, 16, 16)],
)
def test_k_aux_is_a_power_of_two_near_half_the_width(d_model, n_latents, k_aux):
    assert LossConfig().resolve_k_aux(d_model, n_latents) == k_aux
    assert LossConfig(k_aux=7).resolve_k_aux(d_model, n_latents) == 7


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_aux": L + 1}, rf"Loss\.k_aux = {L + 1} must not exceed SAE\.n_latents = {L}"),
        (
            {"multi_topk_coefficient": 0.1, "multi_topk_factor": 11},
            r"Loss\.multi_topk_factor = 11 times SAE\.k = 3 exceeds",
        ),
    ],
)
def test_losses_that_do_not_fit_the_model(change, message):
    with pytest.raises(ValueError, match=message):
        loss_spec(SAE, dataclasses.replace(LOSS, **change), TopKConfig(), 1)


@pytest.mark.parametrize(
    "field, value",
    [
        ("auxk_coefficient", -1.0),
        ("auxk_coefficient", float("nan")),
        ("multi_topk_coefficient", float("inf")),
        ("k_aux", 0),
        ("dead_tokens", 0),
        ("dead_tokens", 2**31),
        ("multi_topk_factor", 1),
    ],
)
def test_bad_loss_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        LossConfig(**{field: value})


def test_capacities_reach_from_none_to_all():
    assert auxk_capacities(4, 32) == [0, 4, 32]
    assert auxk_capacities(32, 32) == [0, 32]
    assert auxk_capacities(512, 2**15) == [0, 512, 4096, 2**15]
    assert auxk_capacities(64, 8) == [0, 8]


def test_what_data_rows_send_each_other_is_what_is_fewer_bytes():
    """By hand: codes move code + 2 rows a token, gradients 4 float32 rows a latent (a ring sum)."""
    sae = SAEConfig(d_model=768, n_latents=32_768, k=256)
    shape = mesh_lib.MeshShape(8, 1)
    dense = loss_spec(sae, LossConfig(), TopKConfig(), 1, platform="tpu")
    codes, gradients = bytes_over_data(dense, sae, shape, 32_768)
    assert codes == 7 / 8 * 32_768 * (2 * 4 * 32_768 + 2 * 2 * 768)  # 32,768 <= 184 * 256: dense
    assert gradients == 7 / 8 * 4 * 4 * 32_768 * 768
    assert codes > gradients
    wide = SAEConfig(d_model=12_288, n_latents=2**24, k=256)
    pairs = loss_spec(wide, LossConfig(), TopKConfig(), 256, platform="tpu")
    codes, gradients = bytes_over_data(pairs, wide, mesh_lib.MeshShape(2, 256), 131_072)
    assert codes == 131_072 / 2 * (16 * 8 + 2 * 2 * 12_288)
    assert codes < gradients


SETTINGS = {
    "defaults": ({}, {}, {}),
    "everything": (
        {"latent_bias": False},
        {"multi_topk_coefficient": 0.125, "multi_topk_factor": 2},
        {"clip_norm": 0.05, "warmup_steps": 2, "decay": "linear"},
    ),
    "no relu, no average": ({"relu": False}, {}, {"ema_decay": None, "unit_norm_decoder": False}),
}


@pytest.mark.parametrize(
    "name, mesh_shape",
    [
        ("defaults", (1, 1)),
        ("everything", (2, 4)),
        ("no relu, no average", (2, 4)),
        pytest.param("defaults", (2, 4), marks=pytest.mark.slow),
        pytest.param("everything", (1, 1), marks=pytest.mark.slow),
        pytest.param("no relu, no average", (1, 1), marks=pytest.mark.slow),
    ],
)
def test_dense_autodiff_and_optax_train_alike(name, mesh_shape):
    sae, loss, optimizer = (
        dataclasses.replace(base, **change)
        for base, change in zip((SAE, LOSS, OPTIMIZER), SETTINGS[name], strict=True)
    )
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(*mesh_shape))
    ends, metrics = {}, {}
    for gradients in ("sparse", "dense"):
        step = make_step(
            sae,
            loss,
            optimizer,
            TopKConfig(capacity_factor=None),
            Normalizer(),
            mesh,
            batch_tokens=B,
            chunks=1,
            steps=10,
            kernels=KernelConfig(gradients=gradients),
        )
        step = jit_step(step, abstract_state(sae, optimizer, 10), mesh)
        state, history = silenced(create(0, sae, optimizer, 10, batch(99), mesh)), []
        for seed in range(3):
            state, seen = step(state, jnp.asarray(batch(seed)))
            history.append(jax.device_get(seen))
        ends[gradients], metrics[gradients] = jax.device_get(state), history
    assert all(seen.dead > 0 and seen.auxk > 0 for seen in metrics["dense"])
    for got, want in zip(jax.tree.leaves(metrics["sparse"]), jax.tree.leaves(metrics["dense"])):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(ends["sparse"]), jax.tree.leaves(ends["dense"])):
        scale = max(np.abs(want).max(), 1e-12)
        np.testing.assert_allclose(got, want, atol=2e-4 * scale, rtol=0)


@pytest.mark.parametrize("field, value", [("implementation", "triton"), ("gradients", "exact")])
def test_bad_kernel_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} = '{value}' must be"):
        KernelConfig(**{field: value})


def test_a_kernel_that_cannot_run_here_is_refused():
    kernels = KernelConfig(implementation="mosaic_tpu")
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape())
    sizes = {"batch_tokens": B, "chunks": 1, "steps": 10}
    step = make_step(
        SAE, LOSS, OPTIMIZER, TopKConfig(), Normalizer(), mesh, **sizes, kernels=kernels
    )
    state = abstract_state(SAE, OPTIMIZER, 10)
    with pytest.raises(NotImplementedError, match="the target is cpu"):
        jax.eval_shape(step, state, jax.ShapeDtypeStruct((B, D), jnp.float32))


@pytest.mark.parametrize(
    "n_latents, shards, layout",
    [
        (72, 1, "dense, because n = 72 <= 24 k, k = 3"),
        (80, 1, "rows, because n = 80 > 24 k, k = 3"),
        (80, 2, "pairs, because n = 80 over 2 shards > 24 k, k = 3"),
    ],
)
def test_the_layout_of_codes_is_told(n_latents, shards, layout):
    sae = dataclasses.replace(SAE, n_latents=n_latents)
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(1, shards))
    loss = dataclasses.replace(LOSS, auxk_coefficient=0.0)
    sizes = {"batch_tokens": B, "chunks": 1, "steps": 10}
    step = make_step(sae, loss, OPTIMIZER, TopKConfig(), Normalizer(), mesh, **sizes)
    batch_BD = jax.ShapeDtypeStruct((B, D), jnp.float32)
    said = explain(step, abstract_state(sae, OPTIMIZER, 10), batch_BD).splitlines()
    assert f"codes: {layout}" in said and any(line.startswith("topk_encode: ") for line in said)


def test_the_dense_step_survives_a_residual_without_spread():
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape())
    sizes = {"batch_tokens": B, "chunks": 1, "steps": 10}
    parts = (SAE, LOSS, OPTIMIZER, TopKConfig(), Normalizer(kind="none"), mesh)
    norms = []
    for gradients in ("sparse", "dense"):
        step = make_step(*parts, **sizes, kernels=KernelConfig(gradients=gradients))
        state = silenced(create(0, SAE, OPTIMIZER, 10, batch(99), mesh))
        _, metrics = jax.jit(step)(state, jnp.full((B, D), 0.5))
        assert metrics.auxk_skipped == 1 and metrics.auxk == 0
        norms.append(float(metrics.grad_norm))
    assert norms[0] > 0
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


@pytest.mark.parametrize(
    "tokens, shards, latents, block",
    [
        (2048, 1, 4096, 2048),
        (2048, 1, 131_072, 64),
        (2040, 1, 131_072, 60),  # more blocks than the least, but equal
        (2039, 1, 131_072, 64),  # a prime: 31 blocks of 64, and one of 55
        (2039, 4, 131_072, 16),
        (2039, 1, 2**24, 8),
        (30, 1, 1, 30),
    ],
)
def test_auxk_blocks_bound_its_pre_activations(tokens, shards, latents, block):
    assert auxk_block_tokens(tokens, shards, latents, platform="cpu") == block
    most = sparse.block_tokens(latents, platform="cpu")
    assert block * shards <= most and tokens // block <= 4 * -(-tokens // (most // shards))


@pytest.mark.parametrize("mesh_shape, chunks", [((1, 1), 3), ((1, 2), 1)])
def test_auxk_in_blocks_that_are_not_equal(monkeypatch, mesh_shape, chunks):
    """17 tokens of each device, a prime, in blocks of 6, 6 and 5, train as dense autodiff does."""
    monkeypatch.setattr(encode_xla, "_BLOCK_BYTES", {"cpu": 8 * 4 * L})
    devices = mesh_shape[0] * mesh_shape[1]
    dead = L // mesh_shape[1]
    assert auxk_block_tokens(17, mesh_shape[1], dead, platform="cpu") == 6
    mesh, tokens = mesh_lib.make_mesh(mesh_lib.MeshShape(*mesh_shape)), 17 * devices * chunks
    x = np.random.default_rng(0).normal(size=(tokens, D)).astype(np.float32)
    ends, metrics = {}, {}
    for gradients in ("sparse", "dense"):
        step = make_step(
            *(SAE, LOSS, OPTIMIZER, TopKConfig(capacity_factor=None), Normalizer(), mesh),
            batch_tokens=tokens,
            chunks=chunks,
            steps=10,
            kernels=KernelConfig(gradients=gradients),
        )
        step = jit_step(step, abstract_state(SAE, OPTIMIZER, 10), mesh)
        state, seen = step(silenced(create(0, SAE, OPTIMIZER, 10, x, mesh)), jnp.asarray(x))
        ends[gradients], metrics[gradients] = jax.device_get((state, seen))
    assert metrics["dense"].dead > LOSS.k_aux and metrics["dense"].auxk > 0
    for got, want in zip(jax.tree.leaves(metrics["sparse"]), jax.tree.leaves(metrics["dense"])):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for got, want in zip(jax.tree.leaves(ends["sparse"]), jax.tree.leaves(ends["dense"])):
        scale = max(np.abs(want).max(), 1e-12)
        np.testing.assert_allclose(got, want, atol=2e-4 * scale, rtol=0)
