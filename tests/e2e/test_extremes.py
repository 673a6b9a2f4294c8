"""Runs at the edges of what is allowed go through every stage."""

import json
import pathlib

import pytest

from saejax.config import load_experiment

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = [
    "Train.tokens = 2048",
    "Train.batch_size = 256",
    "Train.sample_rows = 512",
    "Train.log_every = 4",
    "Synthetic.held_out_rows = 512",
    "Synthetic.features = 16",
    "Synthetic.d_model = 8",
    "Synthetic.mean_l0 = 2.0",
    "Evaluation.pca_tokens = 512",
    "SAE.d_model = 8",
]


def run(folder, *bindings):
    gin_file = str(ROOT / "gin/synthetic.gin")
    experiment, operative, as_json = load_experiment([gin_file], [*SMALL, *bindings])
    assert experiment.run(folder, operative_gin=operative, config_json=as_json, argv=["test"]) == 0
    assert (folder / "report.html").stat().st_size > 10_000
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_every_latent_kept_and_more_than_dimensions(tmp_path):
    result = run(tmp_path / "run", "SAE.n_latents = 12", "SAE.k = 12", "SAE.relu = False")
    assert result["l0"] == pytest.approx(12, abs=1e-3)
    assert result["baselines"]["pca_components"] == 8
    assert result["baselines"]["pca_nmse"] < 1e-9


@pytest.mark.slow
def test_without_relu_training_and_evaluation_count_alike(tmp_path):
    result = run(tmp_path / "run", "SAE.n_latents = 32", "SAE.k = 20", "SAE.relu = False")
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["l0"] == pytest.approx(20)
    assert result["l0"] == pytest.approx(20)


def test_one_latent(tmp_path):
    result = run(tmp_path / "run", "SAE.n_latents = 1", "SAE.k = 1")
    assert result["l0"] <= 1 and 0 <= result["dead_fraction"] <= 1
