"""gin/synthetic.gin as shipped: training finds the features that the data was made of."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import saejax
from saejax import config
from saejax.data.synthetic import Synthetic
from saejax.evals import recovery
from saejax.fit import fit
from saejax.mesh import MeshShape, make_mesh
from saejax.run import recovery_scores
from saejax.rundir import RunDirectory
from saejax.sources import open_source

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINDINGS = ["Experiment.report = None", "Mesh.mesh_shape = (1, 1)"]


@pytest.fixture(scope="module")
def experiment():
    built, operative, as_json = config.load_experiment(["gin/synthetic.gin"], BINDINGS)
    return built, operative, as_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The finished run, of a process that is compiled to be fast, as those of users are."""
    folder = tmp_path_factory.mktemp("synthetic") / "run"
    command = [sys.executable, "-m", "saejax.main", "--gin_file=gin/synthetic.gin"]
    bindings = [f"--gin_bindings={binding}" for binding in BINDINGS]
    env = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([*command, *bindings, f"--workdir={folder}"], check=True, cwd=ROOT, env=env)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_the_recipe_is_the_one_that_is_promised(experiment):
    """Guards the other tests: an easier problem would pass them too."""
    data, sae = experiment[0].data, experiment[0].sae
    assert data.features == 512 and data.d_model == 64 and data.exponent == 1.0 and data.noise > 0
    assert sae.k == data.mean_l0 == 4 and sae.n_latents < 1024


def test_the_common_features_are_found(result):
    found = result["recovery"]
    assert found["matched_common"] >= 0.95
    assert found["matched"] >= 0.9 and found["mmcs"] >= 0.95
    assert found["f1"] >= 0.65 and found["f1_common"] >= 0.7
    assert found["chance_mmcs"] < 0.5 and found["chance_matched"] == 0


def test_so_is_the_sparsity_and_the_error(result):
    assert result["nmse"] < 0.12 < result["baselines"]["pca_nmse"] / 4
    assert result["explained_variance"] > 0.85
    assert 3.9 < result["l0"] <= 4
    assert result["dead_fraction_train"] < 0.07
    assert result["dead_fraction"] < 0.07
    assert result["tokens"] == 65_536 and "delta_ce" not in result


def test_without_training_nothing_is_found(experiment, folder, result):
    """The same scores tell a dictionary that was not trained from one that was.

    (Were the features drawn from the keys that the weights are drawn from, they would not.)
    """
    built = experiment[0]
    run = RunDirectory(folder)
    mesh = make_mesh(MeshShape())
    source = open_source(
        built.data, built.sae, built.loader, built.train.batch_size, run.activations, mesh
    )
    fitted = fit(
        built.recipe(),
        source.batches,
        identity=source.identity,
        checkpoints=run.checkpoints,
        write_to=run.path,
    )
    assert recovery_scores(source, fitted) == pytest.approx(result["recovery"])
    before = recovery_scores(source, dataclasses.replace(fitted, export=fitted.untrained))
    assert before["matched"] < 0.01 and before["mmcs"] < 0.5 and before["f1"] < 0.15
    assert before["chance_mmcs"] == pytest.approx(result["recovery"]["chance_mmcs"])


def test_latents_code_the_magnitudes_of_their_features(experiment, folder):
    """Beyond directions: the value of a found latent is the magnitude of its feature."""
    truth, sae = Synthetic(experiment[0].data, 1024), saejax.load(folder)
    rows, magnitudes = truth.held_out()
    rows, magnitudes = rows[:4096], magnitudes[:4096]
    _, match = recovery.match(truth.features, np.asarray(sae.w_dec[...]))
    latents = sae.encode(rows)
    values = np.zeros((len(rows), sae.config.n_latents), np.float32)
    np.put_along_axis(values, np.asarray(latents.indices), np.asarray(latents.values), axis=1)
    coded = values[:, match] * np.asarray(latents.scale)
    both = (coded > 0) & (magnitudes > 0)
    assert both.sum() > 8000
    assert np.corrcoef(coded[both], magnitudes[both])[0, 1] > 0.9
    # and the reconstruction is in the units of the data
    error = np.asarray(sae.decode(latents)) - rows
    assert np.square(error).sum() < 0.15 * np.square(rows - rows.mean(0)).sum()
