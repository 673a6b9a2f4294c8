"""Checkpoints: what is read is what was written, or an error names what does not fit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.checkpoint import CheckpointConfig, Checkpoints
from saejax.fit import abstract_like
from saejax.mesh import MeshShape
from saejax.model.sae import SAEConfig
from saejax.train import state as state_lib
from saejax.train.optim import OptimizerConfig

SAE = SAEConfig(d_model=8, n_latents=16, k=2)


def make(sae=SAE, optimizer=OptimizerConfig(), mesh=MeshShape(), step=0):
    sample = np.random.default_rng(0).normal(size=(64, sae.d_model))
    state = state_lib.create(0, sae, optimizer, 100, sample, mesh_lib.make_mesh(mesh))
    # Values that no initialisation has: restoring a fresh state would not pass.
    return dataclasses.replace(
        state,
        step=jnp.int32(step),
        tokens_since_fired=state.tokens_since_fired + jnp.arange(16)[: sae.n_latents],
        ema=jax.tree.map(lambda leaf: leaf + 0.25, state.ema),
    )


@pytest.fixture(scope="module")
def state():
    return make(step=7)


@pytest.fixture
def store(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints")
    yield opened
    opened.close()


def test_a_state_survives(store, state):
    assert store.latest() is None
    store.save(state, {"note": "x", "nested": {"a": [1, 2.5, None]}})
    assert store.latest() == 7
    again = Checkpoints(store.directory)
    assert again.metadata(7) == {"format": 1, "note": "x", "nested": {"a": [1, 2.5, None]}}
    restored = again.restore(7, abstract_like(make()))
    again.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(state), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def test_it_comes_back_in_the_layout_that_is_asked_for(store, state):
    store.save(state, {})
    wanted = abstract_like(make(mesh=MeshShape(2, 4)))
    restored = store.restore(7, wanted)
    assert restored.params["w_dec"].sharding == wanted.params["w_dec"].sharding
    assert restored.params["w_dec"].addressable_shards[0].data.shape == (4, 8)
    np.testing.assert_array_equal(restored.params["w_dec"], state.params["w_dec"])


def test_a_missing_step_names_those_that_are_there(store, state):
    store.save(state, {})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 3 in .*; present: \[7\]"):
        store.metadata(3)


def test_another_format_is_refused(store, state):
    store.save(state, {})
    (file,) = [f for f in (store.directory / "7/metadata").iterdir() if f.name == "metadata"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="checkpoints/7 has format 2; this version reads format 1"):
        store.metadata(7)


def test_a_step_that_is_there_is_not_written_again(store, state):
    store.save(state, {"first": True})
    for step in (7, 5):
        older = dataclasses.replace(state, step=jnp.int32(step))
        with pytest.raises(Exception, match=r"[Cc]heckpoint.* 7|step 7"):
            store.save(older, {"first": False})
    assert store.metadata(7)["first"]


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (None, [1, 2, 3, 4])])
def test_only_the_newest_are_kept(tmp_path, state, keep, left):
    store = Checkpoints(tmp_path / "checkpoints", keep)
    for step in (1, 2, 3, 4):
        store.save(dataclasses.replace(state, step=jnp.int32(step)), {})
    store.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == left


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (
            {"sae": SAEConfig(d_model=8, n_latents=12, k=2)},
            [
                r"params\.w_dec is float32\[16, 8\], the configuration needs float32\[12, 8\]",
                r"and \d+ more",
            ],
        ),
        ({"sae": SAEConfig(d_model=4, n_latents=16, k=2)}, [r"params\.pre_bias is float32\[8\]"]),
        (
            {"optimizer": OptimizerConfig(ema_decay=None)},
            [r"ema\.w_dec is float32\[16, 8\], the configuration needs absent"],
        ),
    ],
)
def test_another_shape_is_refused_by_name(store, state, wanted, names):
    """Nothing is cut, filled or cast to fit; each array is named."""
    store.save(state, {})
    sae, optimizer = wanted.get("sae", SAE), wanted.get("optimizer", OptimizerConfig())
    abstract = state_lib.abstract_state(sae, optimizer, 100)
    with pytest.raises(ValueError, match=r"checkpoints/7 does not fit.*another workdir") as caught:
        store.restore(7, abstract)
    for name in names:
        assert caught.match(name)


def test_another_dtype_is_refused_by_name(store, state):
    store.save(state, {})
    wanted = abstract_like(state)
    narrow = jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=wanted.params["pre_bias"].sharding)
    wanted = dataclasses.replace(wanted, params=wanted.params | {"pre_bias": narrow})
    with pytest.raises(ValueError, match=r"params\.pre_bias is float32\[8\].* needs bfloat16\[8\]"):
        store.restore(7, wanted)


@pytest.mark.parametrize(
    ("field", "value"), [("every_steps", 0), ("every_steps", -1), ("keep", 0), ("keep", -3)]
)
def test_wrong_values_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value} must be at least 1"):
        CheckpointConfig(**{field: value})
