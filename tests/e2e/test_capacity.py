"""What a run on many latent shards says of its selection: metrics, warning, checkpoint."""

import json
import logging

import pytest

import saejax
from saejax.capacity import TopKConfig
from saejax.checkpoint import Checkpoints
from saejax.data.synthetic import SyntheticConfig
from saejax.mesh import MeshConfig
from saejax.model.sae import SAEConfig
from saejax.train.loop import TrainConfig
from saejax.train.optim import OptimizerConfig


def train(workdir, topk):
    """A short run on eight latent shards; its last record and what its checkpoint keeps."""
    saejax.train(
        SyntheticConfig(features=64, d_model=16, mean_l0=3.0),
        sae=SAEConfig(d_model=16, n_latents=128, k=6),
        train=TrainConfig(tokens=2048, batch_size=256, sample_rows=256, log_every=4),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        topk=topk,
        mesh=MeshConfig(mesh_shape=(1, 8)),
        workdir=workdir,
    )
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    store = Checkpoints(workdir / "checkpoints")
    selection = store.metadata(store.latest())["selection"]
    store.close()
    return records, selection


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "saejax")
    return lambda: [message for message in caplog.messages if "at_capacity" in message]


def test_the_papers_bare_rule_warns_once(tmp_path, warnings):
    records, selection = train(tmp_path, TopKConfig(max_expected_loss=None))
    assert selection["shards"] == 8 and selection["capacity"]["main"] == 2
    assert all(record["at_capacity"] > 0.05 for record in records)
    (message,) = [m for m in warnings() if m.startswith("at_capacity")]
    assert "at step 4" in message and "TopK.capacity_factor = None" in message


def test_an_exact_capacity_is_never_reached(tmp_path, warnings):
    records, selection = train(tmp_path, TopKConfig(capacity_factor=None))
    assert selection["capacity"]["main"] == 6
    assert [record["at_capacity"] for record in records] == [0.0, 0.0]
    assert warnings() == []
