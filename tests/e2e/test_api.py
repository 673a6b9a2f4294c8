"""The Python interface, as a notebook uses it: train, load, encode, decode."""

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saejax
from saejax.checkpoint import CheckpointConfig
from saejax.data.loader import LoaderConfig
from saejax.data.synthetic import Synthetic, SyntheticConfig
from saejax.mesh import MeshConfig
from saejax.model.sae import SAE, SAEConfig
from saejax.train.loop import TrainConfig
from saejax.train.optim import OptimizerConfig

STEPS = 12
CONFIG = SAEConfig(d_model=16, n_latents=64, k=4, normalization="scalar")
ARGUMENTS = {
    "sae": CONFIG,
    "train": TrainConfig(tokens=STEPS * 64, batch_size=64, sample_rows=128, log_every=4),
    "optimizer": OptimizerConfig(learning_rate=1e-2, ema_decay=0.9),
    "checkpoint": CheckpointConfig(every_steps=5, keep=None),
}


@pytest.fixture(scope="module")
def rows():
    features = SyntheticConfig(features=64, d_model=16, mean_l0=3.0)
    return 5 * np.asarray(Synthetic(features, 300).batch(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory, rows):
    """(run directory, what `train` returned)."""
    folder = tmp_path_factory.mktemp("api") / "run"
    return folder, saejax.train(rows, **ARGUMENTS, workdir=folder)


def assert_same(a: SAE, b: SAE) -> None:
    assert a.config == b.config and a.normalizer == b.normalizer
    for name, value in a.params.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(b.params[name]), err_msg=name)


# --- train and load -------------------------------------------------------------------------------


def test_what_is_loaded_is_what_train_returned(run):
    folder, trained = run
    assert trained.config == CONFIG and trained.normalizer.scale != 1
    for place in (folder, str(folder), folder / "checkpoints", folder / f"checkpoints/{STEPS}"):
        assert_same(saejax.load(place), trained)
    early = saejax.load(folder / "checkpoints/5")
    assert not np.array_equal(early.w_dec[...], trained.w_dec[...])
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["10", "12", "5"]


def test_training_learned_something(run, rows):
    trained = run[1]

    def error(sae):
        return float(np.square(np.asarray(sae(rows)) - rows).sum() / np.square(rows).sum())

    early = saejax.load(run[0] / "checkpoints/5")
    assert error(trained) < 0.9 * error(early) < error(early) < 0.5
    np.testing.assert_allclose(np.linalg.norm(trained.w_dec[...], axis=1), 1, rtol=1e-5)


def test_without_a_workdir_the_result_is_the_same_and_nothing_stays(
    run, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert_same(saejax.train(rows, **ARGUMENTS), run[1])
    assert list(tmp_path.iterdir()) == []


def test_calling_again_continues_and_ends_bit_identical(run, rows, tmp_path):
    folder = tmp_path / "run"
    saejax.train(rows, **ARGUMENTS, workdir=folder)
    for step in ("10", "12"):  # as if it had been stopped after step 5
        subprocess.run(["rm", "-r", str(folder / "checkpoints" / step)], check=True)
    assert_same(saejax.train(rows, **ARGUMENTS, workdir=folder), run[1])
    steps = [json.loads(s)["step"] for s in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12]
    # once more: nothing is left to do
    assert_same(saejax.train(rows, **ARGUMENTS, workdir=folder), run[1])
    assert len(json.loads((folder / "run.json").read_text())["starts"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": dataclasses.replace(CONFIG, k=5)}, "recipe.sae.k: 4 -> 5"),
        ({"optimizer": OptimizerConfig(learning_rate=2e-2)}, "learning_rate: 0.01 -> 0.02"),
        ({"loader": LoaderConfig(seed=3)}, "loader.seed: 0 -> 3"),
    ],
)
def test_other_arguments_in_the_same_workdir_are_refused(run, rows, changes, message):
    metrics = (run[0] / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        saejax.train(rows, **ARGUMENTS | changes, workdir=run[0])
    assert (run[0] / "metrics.jsonl").read_bytes() == metrics
    assert_same(saejax.load(run[0]), run[1])


def test_other_activations_in_the_same_workdir_are_refused(run, rows):
    other = rows.copy()
    other[7, 3] += 1e-3
    with pytest.raises(ValueError, match="trained on other activations"):
        saejax.train(other, **ARGUMENTS, workdir=run[0])
    with pytest.raises(ValueError, match="another configuration"):
        saejax.train(SyntheticConfig(d_model=16), **ARGUMENTS, workdir=run[0])
    assert_same(saejax.load(run[0]), run[1])


def test_arrays_of_jax_and_of_other_precisions(run, rows):
    assert_same(saejax.train(jnp.asarray(rows), **ARGUMENTS), run[1])
    for dtype in (np.float64, jnp.bfloat16):
        sae = saejax.train(rows.astype(dtype), **ARGUMENTS)
        close = np.abs(np.asarray(sae.pre_bias[...]) - np.asarray(run[1].pre_bias[...])).max()
        assert close < (1e-6 if dtype == np.float64 else 0.02), dtype
        assert sae.w_dec[...].dtype == jnp.float32


def test_too_few_devices_are_found_before_anything_is_made(rows, tmp_path):
    with pytest.raises(ValueError, match=r"\(16, 1\) asks for 16 devices, but 8 are present"):
        saejax.train(
            rows, **ARGUMENTS, mesh=MeshConfig(mesh_shape=(16, 1)), workdir=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_a_synthetic_source_needs_no_array(tmp_path):
    sae = saejax.train(SyntheticConfig(d_model=16), **ARGUMENTS, workdir=tmp_path / "run")
    assert_same(saejax.load(tmp_path / "run"), sae)


# --- encode and decode ----------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_dimensions(run, rows, leading):
    sae = run[1]
    count = int(np.prod(leading))
    x = rows[:count].reshape(*leading, 16)
    latents = sae.encode(x)
    assert latents.values.shape == latents.indices.shape == (*leading, 4)
    assert latents.values.dtype == jnp.float32 and latents.indices.dtype == jnp.int32
    flat = sae.encode(rows[:300])
    np.testing.assert_array_equal(
        np.asarray(latents.indices).reshape(-1, 4), np.asarray(flat.indices)[:count]
    )
    decoded = sae.decode(latents)
    assert decoded.shape == (*leading, 16) and sae(x).shape == decoded.shape
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(sae(x)))
    np.testing.assert_allclose(
        np.asarray(decoded).reshape(-1, 16), np.asarray(sae(rows))[:count], rtol=1e-5, atol=1e-5
    )


def test_a_code_means_what_it_says(run, rows):
    """values and indices are the top k of the dense pre-activations; decode is their dictionary."""
    sae = run[1]
    latents, dense = sae.encode(rows), np.asarray(sae.pre_activations(rows))
    expected = np.argsort(-dense, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(np.asarray(latents.indices), expected)
    values = np.maximum(np.take_along_axis(dense, expected, 1), 0)
    np.testing.assert_allclose(np.asarray(latents.values), values, rtol=1e-5, atol=1e-6)
    rebuilt = np.einsum("nk,nkd->nd", values, np.asarray(sae.w_dec[...])[expected])
    rebuilt = (rebuilt + np.asarray(sae.pre_bias[...])) * sae.normalizer.scale
    np.testing.assert_allclose(np.asarray(sae.decode(latents)), rebuilt, rtol=1e-4, atol=1e-4)


def test_latents_can_be_edited_and_are_a_pytree(run, rows):
    sae = run[1]
    latents = sae.encode(rows[:5])
    silent = dataclasses.replace(latents, values=jnp.zeros_like(latents.values))
    bias = np.broadcast_to(np.asarray(sae.pre_bias[...]) * sae.normalizer.scale, (5, 16))
    np.testing.assert_allclose(np.asarray(sae.decode(silent)), bias, rtol=1e-5, atol=1e-6)
    first = jax.tree.map(lambda leaf: leaf[:2], latents)
    np.testing.assert_allclose(np.asarray(sae.decode(first)), np.asarray(sae(rows[:2])), rtol=1e-5)
    jitted = jax.jit(lambda module, x: module.encode(x).indices)(sae, rows[:5])
    np.testing.assert_array_equal(np.asarray(jitted), np.asarray(latents.indices))


def test_another_width_is_refused(run):
    for shape in ((3, 15), (16, 3), (), (1,)):
        with pytest.raises(ValueError, match=r"do not end in d_model = 16"):
            run[1].encode(np.zeros(shape, np.float32))


# --- The callable package -------------------------------------------------------------------------


def test_train_is_a_function_and_a_package():
    import saejax.train.loop
    from saejax.train import loss, step

    assert saejax.train.loop.TrainConfig is TrainConfig
    assert importlib.import_module("saejax.train") is saejax.train
    assert callable(saejax.train) and inspect.ismodule(saejax.train)
    for value in (TrainConfig(tokens=64, batch_size=8), loss.LossConfig(), step.make_step):
        assert pickle.loads(pickle.dumps(value)) == value == copy.deepcopy(value)


def test_train_shows_its_arguments():
    names = list(inspect.signature(saejax.train).parameters)
    assert names[:3] == ["data", "sae", "train"] and names[-1] == "workdir"
    with pytest.raises(TypeError, match="'sae'"):
        saejax.train(np.zeros((4, 4), np.float32), train=TrainConfig(tokens=4, batch_size=4))


def test_in_a_new_python_in_any_order():
    code = """
import saejax.train.step, saejax.train.optim as optim
from saejax.train.loop import TrainConfig
import sys, saejax
assert "saejax.api" not in sys.modules
assert saejax.train.optim is optim and callable(saejax.train)
from saejax import load, train
assert train is saejax.train and load is saejax.load
import saejax.api
assert saejax.train is train
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_training_works_outside_the_main_thread():
    """Signals belong to the command line; a notebook's thread may train too."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            saejax.train(
                SyntheticConfig(features=16, d_model=8, mean_l0=2.0),
                sae=SAEConfig(d_model=8, n_latents=16, k=2),
                train=TrainConfig(tokens=512, batch_size=64, sample_rows=128),
            )
        )
    )
    thread.start()
    thread.join()
    assert found and found[0].config.n_latents == 16
