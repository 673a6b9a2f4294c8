"""The mesh, the table of partitions, and training that does not depend on either."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.mesh import MeshConfig, MeshShape
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.plan import resolve_mesh
from saejax.recipe import Recipe
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.state import abstract_state, create
from saejax.train.step import jit_step, make_step

D, L, K, B, STEPS = 12, 64, 4, 32, 4
SAE = SAEConfig(d_model=D, n_latents=L, k=K)
LOSS = LossConfig(k_aux=8, dead_tokens=2 * B, multi_topk_coefficient=1 / 8)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, clip_norm=1.0, ema_decay=0.9)


def make_mesh(shape):
    return mesh_lib.make_mesh(MeshShape(*shape))


def fresh(mesh, seed=0):
    rows = np.random.default_rng(5).normal(size=(64, D))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return create(seed, SAE, OPTIMIZER, STEPS, rows, mesh)


@functools.cache
def trained(shape):
    """State and metrics after a few steps on changing clusters, on the host."""
    mesh = make_mesh(shape)
    step = make_step(
        SAE,
        LOSS,
        OPTIMIZER,
        TopKConfig(capacity_factor=None),
        Normalizer(),
        mesh,
        batch_tokens=B,
        chunks=1,
        steps=STEPS,
    )
    step = jit_step(step, abstract_state(SAE, OPTIMIZER, STEPS), mesh)
    rng = np.random.default_rng(6)
    centres = rng.normal(size=(2, D))
    state, history = fresh(mesh), []
    for i in range(STEPS):
        x = np.asarray(centres[i // 2] + rng.normal(size=(B, D)), np.float32)
        x = jax.device_put(x, mesh_lib.token_sharding(mesh))
        state, metrics = jax.block_until_ready(step(state, x))
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)])
def test_training_is_the_same_on_every_mesh(shape):
    state, history = trained(shape)
    want_state, want_history = trained((1, 1))
    assert any(0 < m.dead < L for m in want_history), "the problem must have dead latents"
    np.testing.assert_array_equal(state.tokens_since_fired, want_state.tokens_since_fired)
    for got, want in zip(history, want_history):
        for name in ("tokens", "active", "dead", "auxk_skipped"):
            assert getattr(got, name) == getattr(want, name), name
        for name in ("squared_error", "multi_squared_error", "auxk", "grad_norm"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-4)
    for name, want in want_state.params.items():
        # Adam divides by the size of the gradient: where that is small, rounding is not.
        np.testing.assert_allclose(state.params[name], want, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(state.ema[name], want_state.ema[name], atol=1e-4)
    moved = fresh(make_mesh((1, 1))).params
    assert all(np.abs(moved[name] - want_state.params[name]).max() > 1e-3 for name in moved)


def test_initial_state_is_the_same_on_every_mesh():
    one, other = jax.device_get(fresh(make_mesh((1, 1)))), jax.device_get(fresh(make_mesh((2, 4))))
    for name, want in one.params.items():
        np.testing.assert_allclose(other.params[name], want, rtol=2e-6, atol=1e-7, err_msg=name)
    another = jax.device_get(fresh(make_mesh((1, 1)), seed=1))
    assert np.abs(another.params["w_dec"] - one.params["w_dec"]).max() > 0.1


def test_no_device_holds_a_whole_matrix():
    state = fresh(make_mesh((1, 8)))
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape[0] == L]
    assert len(large) == 3 * 4 + 1, "three arrays by latent in params, EMA, mu and nu; the counter"
    for leaf in large:
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert shard.data.shape == (L // 8, *leaf.shape[1:])
    for shard in state.params["pre_bias"].addressable_shards:
        assert shard.data.shape == (D,)


def test_tokens_are_split_over_the_whole_mesh():
    x = jax.device_put(jnp.zeros((B, D)), mesh_lib.token_sharding(make_mesh((2, 4))))
    assert [shard.data.shape for shard in x.addressable_shards] == [(B // 8, D)] * 8


def test_axes_and_order_of_devices():
    for shape in ((1, 1), (2, 2), (2, 4), (8, 1)):
        mesh = make_mesh(shape)
        assert mesh.axis_names == ("data", "latent")
        assert mesh.devices.shape == shape
        assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_too_few_devices():
    with pytest.raises(
        ValueError, match=r"\(4, 4\) asks for 16 devices, but 8 are present.* \(2, 4\)"
    ):
        make_mesh((4, 4))


@pytest.mark.parametrize(
    "shape", [(0, 1), (1, 0), (-1, 8), (8,), (2, 4, 1), (2.0, 4), (True, 8), "Auto", None, 8, ()]
)
def test_what_is_no_shape(shape):
    with pytest.raises(ValueError, match=r"mesh_shape = .* must be .*at least 1, or 'auto'"):
        MeshConfig(mesh_shape=shape)


def test_indivisible_latents_and_batch():
    config = MeshShape(2, 4)
    mesh_lib.check_divisible(config, 64, 32)
    with pytest.raises(
        ValueError,
        match=r"SAE\.n_latents = 66 .*4 latent shards of Mesh\.mesh_shape = \(2, 4\).* 68",
    ):
        mesh_lib.check_divisible(config, 66, 32)
    with pytest.raises(ValueError, match=r"Train\.batch_size = 36 .* 8 devices.* 40"):
        mesh_lib.check_divisible(config, 64, 36)


def test_specs_by_name_wherever_the_leaf_is():
    matrix, scalar = jnp.zeros((4, 2)), jnp.zeros(())
    specs = mesh_lib.tree_specs({"a": [{"w_dec": matrix}], "count": scalar})
    assert specs == {"a": [{"w_dec": P("latent", None)}], "count": P()}
    state = abstract_state(SAE, OPTIMIZER, STEPS)
    specs = mesh_lib.tree_specs(state)
    (adam,) = [s for s in specs.opt_state if hasattr(s, "mu")]
    for tree in (specs.params, specs.ema, adam.mu, adam.nu):
        assert tree["w_enc"] == tree["w_dec"] == P("latent", None)
        assert tree["latent_bias"] == P("latent")
        assert tree["pre_bias"] == P()
    assert specs.tokens_since_fired == P("latent")


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no partition is known for \['theta'\]"):
        mesh_lib.tree_specs({"theta": jnp.zeros(3)})


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU device tells of its place."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def chips(slices):
    """So many slices of 2 x 2 x 2 chips."""
    return [
        Chip(8 * s + i, (i % 2, i // 2 % 2, i // 4), slice_index=s)
        for s in range(slices)
        for i in range(8)
    ]


@pytest.mark.parametrize("shape", [(2, 8), (4, 4), (16, 1)])
def test_latents_stay_within_a_slice(shape):
    grid = mesh_lib.make_mesh(MeshShape(*shape), chips(2)).devices
    assert grid.shape == shape
    assert all(len({chip.slice_index for chip in row}) == 1 for row in grid)
    assert len({chip.id for chip in grid.flat}) == 16


def test_a_mesh_that_would_split_latents_across_slices_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 16\) would split .* 2 slices .*\(2, 8\)"):
        mesh_lib.make_mesh(MeshShape(1, 16), chips(2))


def test_auto_does_not_choose_one():
    train = TrainConfig(tokens=131_072, batch_size=131_072, microbatch_size=8192)
    recipe = Recipe(sae=SAEConfig(d_model=4096, n_latents=2**22, k=64), train=train)
    shape = resolve_mesh(recipe, chips(2))
    assert shape.data % 2 == 0 and shape.size == 16


@pytest.mark.parametrize("shape", [(1, 3), (1, 5), (7, 1)])
def test_a_part_of_a_torus(shape):
    assert mesh_lib.make_mesh(MeshShape(*shape), chips(1)).devices.shape == shape
