"""The plan's totals, worked out by hand."""

import dataclasses
import re

import pytest

from saejax import plan
from saejax.mesh import MeshShape
from saejax.model.sae import SAEConfig
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig

SAE = SAEConfig(d_model=10, n_latents=1000, k=4)
TRAIN = TrainConfig(tokens=3300, batch_size=320)
PARAMETERS = 2 * 1000 * 10 + 1000 + 10  # both matrices, latent_bias, pre_bias


def sizes(**changes) -> dict[str, int]:
    parts = {
        "sae": SAE,
        "loss": LossConfig(),
        "optimizer": OptimizerConfig(),
        "train": TRAIN,
        "mesh": MeshShape(),
    }
    return plan.bytes_per_device(**parts | changes)


def test_bytes_on_one_device():
    assert sizes() == {
        "parameters": 4 * PARAMETERS,
        "optimizer": 2 * 4 * PARAMETERS + 2 * 4,  # two moments; the counts of Adam and the rate
        "EMA": 4 * PARAMETERS,
        "gradients": 4 * 2 * 1000 * 10,
        "batch: raw, normalised, residual": 3 * 4 * 320 * 10,
        "pre-activations of a microbatch": 4 * 320 * 1000,
    }
    assert sizes(optimizer=OptimizerConfig(ema_decay=None))["EMA"] == 0


def test_bytes_split_over_the_mesh():
    """Latents over 'latent', tokens over 'data'; pre_bias and counts are on every device."""
    split = sizes(mesh=MeshShape(2, 5))
    local = 2 * 200 * 10 + 200 + 10
    assert split["parameters"] == split["EMA"] == 4 * local
    assert split["optimizer"] == 2 * 4 * local + 2 * 4
    assert split["gradients"] == 4 * 2 * 200 * 10
    assert split["batch: raw, normalised, residual"] == 3 * 4 * 160 * 10
    assert split["pre-activations of a microbatch"] == 4 * 160 * 200


def test_microbatches_bound_the_pre_activations_only():
    train = dataclasses.replace(TRAIN, microbatch_size=40)
    whole, small = sizes(), sizes(train=train)
    assert small["pre-activations of a microbatch"] == 4 * 40 * 1000
    assert small["gradients"] == 2 * whole["gradients"]  # the sum, and the microbatch's own
    names = ("pre-activations of a microbatch", "gradients")
    assert {k: v for k, v in whole.items() if k not in names} == {
        k: v for k, v in small.items() if k not in names
    }


def test_a_width_equal_to_the_latents_is_not_split():
    """pre_bias [D] is replicated even where D = L, by its name's rule, not its length."""
    square = SAEConfig(d_model=8, n_latents=8, k=2)
    train = TrainConfig(tokens=64, batch_size=64)
    found = sizes(sae=square, train=train, mesh=MeshShape(1, 4))["parameters"]
    assert found == 4 * (2 * 2 * 8 + 2 + 8)


def test_flops_per_token():
    flops = plan.flops_per_token(SAE, LossConfig(), 320)
    assert flops == {
        "encoder forward": 2 * 10 * 1000,
        "sparse decode": 2 * 10 * 4,
        "sparse gradients": 3 * 2 * 10 * 4,
        "optimizer": 30 * 2 * 1000 * 10 / 320,
    }
    multi = plan.flops_per_token(SAE, LossConfig(multi_topk_coefficient=1 / 8), 320)
    assert multi["sparse decode"] == 2 * 10 * (4 + 16)
    assert multi["encoder forward"] == flops["encoder forward"]


def test_the_text_has_every_total():
    text = plan.describe(SAE, LossConfig(), OptimizerConfig(), TRAIN, MeshShape(2, 5))
    assert text.startswith("mesh        data 2 x latent 5 = 10 devices\n")
    assert "10 steps of 320 tokens (3,200 tokens), 1 microbatches a step" in text
    assert re.search(r"rate +0\.00081, k_aux 4\n", text)  # 2e-4 / sqrt(1000 / 2^14); near 10 / 2
    for name, shape, count in (
        ("w_enc", "1000x10", "10,000"),
        ("w_dec", "1000x10", "10,000"),
        ("latent_bias", "1000", "1,000"),
        ("pre_bias", "10", "10"),
    ):
        assert re.search(rf"^  {name} +{shape} +{count}$", text, re.MULTILINE), name
    totals = re.findall(r"^  total +(\S.*)$", text, re.MULTILINE)
    split = sizes(mesh=MeshShape(2, 5))
    assert totals[0] == f"{PARAMETERS:,}"
    assert totals[1] == f"{sum(split.values()) / 1024:.1f} KiB"
    assert totals[2] == f"{20_000 + 80 + 240 + 1875:,}"


@pytest.mark.parametrize(
    ("d_model", "expected"), [(2, 1), (3, 2), (4, 2), (192, 128), (768, 512), (12_288, 8192)]
)
def test_k_aux_is_the_power_of_two_nearest_half_the_width(d_model, expected):
    assert LossConfig().resolve_k_aux(d_model, 10**6) == expected
    assert LossConfig().resolve_k_aux(d_model, 1) == 1
