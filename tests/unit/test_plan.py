"""The plan's totals, worked out by hand, and its text."""

import dataclasses
import importlib
import importlib.util
import re

import jax
import pytest

from pallas_kernels.topk_encode import xla as encode_xla
from saejax import plan
from saejax.mesh import MeshConfig, MeshShape
from saejax.model.sae import SAEConfig
from saejax.plan.compiled import Compiled
from saejax.plan.estimate import Estimate
from saejax.plan.hardware import parse_topology
from saejax.plan.hlo import Collective
from saejax.plan.traffic import expected_collectives
from saejax.plan.workload import Workload
from saejax.recipe import Recipe
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig

SAE = SAEConfig(d_model=10, n_latents=1000, k=4)
RECIPE = Recipe(
    sae=SAE, train=TrainConfig(tokens=3300, batch_size=320), loss=LossConfig(auxk_coefficient=0)
)
PARAMETERS = 2 * 1000 * 10 + 1000 + 10  # both matrices, latent_bias, pre_bias


def work(shape=(1, 1), topology=None, **changes) -> Workload:
    recipe = dataclasses.replace(RECIPE, mesh=MeshConfig(mesh_shape=shape))
    for name, fields in changes.items():
        recipe = dataclasses.replace(
            recipe, **{name: dataclasses.replace(getattr(recipe, name), **fields)}
        )
    shape = MeshShape(*shape)
    return Workload(recipe, shape, parse_topology(topology or f"gpu:H100x{shape.size}"))


def memory(*args, **kwargs) -> dict[str, int]:
    return Estimate(work(*args, **kwargs)).memory


def test_the_state_of_one_device():
    found = work().state_bytes
    assert found == {
        "parameters": 4 * PARAMETERS,
        "optimizer state": 2 * 4 * PARAMETERS + 2 * 4,  # two moments; counts of Adam and the rate
        "EMA": 4 * PARAMETERS,
        # Tokens since fired; step and variance; the guard's two windows of 128 and two counts.
        "counters": 4 * 1000 + 2 * 4 + 2 * 128 * 4 + 2 * 4,
    }
    assert work(optimizer={"ema_decay": None}).state_bytes["EMA"] == 0


def test_the_state_splits_over_the_mesh():
    """Latents over 'latent'; pre_bias and counts are on every device."""
    found = work((2, 5)).state_bytes
    local = 2 * 200 * 10 + 200 + 10
    assert found["parameters"] == found["EMA"] == 4 * local
    assert found["optimizer state"] == 2 * 4 * local + 2 * 4


def test_a_width_equal_to_the_latents_is_not_split():
    """pre_bias [D] is replicated even where D = L, by its name's rule, not its length."""
    square = {"d_model": 8, "n_latents": 8, "k": 2}
    found = work((1, 4), sae=square).state_bytes["parameters"]
    assert found == 4 * (2 * 2 * 8 + 2 + 8)


def test_what_a_step_holds():
    found = memory((2, 5), train={"microbatch_size": 40})
    assert found["batch"] == 2 * 32 * 10
    assert found["gradients"] == 2 * 4 * 200 * 10
    assert found["weights in the compute dtype"] == 2 * 2 * 200 * 10
    assert "AuxK" not in found
    whole = memory((2, 5))
    ratio = whole["pre-activations of a block"] / found["pre-activations of a block"]
    assert ratio == 160 / 40
    # No copy of the weights where they are multiplied as they are.
    cpu = memory((2, 5), "cpu:10")
    assert "weights in the compute dtype" not in cpu
    assert "AuxK" in memory((2, 5), loss={"auxk_coefficient": 1 / 32})


def test_flops():
    """Of a device and step: 320 tokens on two data rows, 1000 latents on five shards."""
    # 160 tokens a data row, four latents each, a fifth of them here: 128 pairs, ten wide.
    assert work((2, 5), mesh={"data_exchange": "gradients"}).flops() == {
        "encoder forward": 640_000,  # 160 tokens x 200 latents x 10 multiply-adds
        "sparse decode": 2560,
        "sparse gradients": 7680,  # the values' and those of both matrices
        "AuxK": 0,
        "optimizer": 120_000,  # 30 for each of 2 x 200 x 10
    }
    # The other row's 128 pairs come along in the gradients of both matrices.
    gathered = work((2, 5), mesh={"data_exchange": "codes"}).flops()
    assert gathered["sparse decode"] == 2560
    assert gathered["sparse gradients"] == 2560 + 2 * 2 * 2560
    multi = work((2, 5), loss={"multi_topk_coefficient": 1 / 8}).flops()
    assert multi["sparse decode"] == 2 * 10 * 160 * (4 + 16) / 5
    dead = work((1, 1), loss={"auxk_coefficient": 1 / 32, "k_aux": 8}).flops()
    assert dead["AuxK"] == 5 * 2 * 10 * 320 * 64  # 50 dead: a block of 64, small enough for dense
    rare = {"d_model": 10, "n_latents": 10**6, "k": 4}
    many = work(sae=rare, loss={"auxk_coefficient": 1 / 32, "k_aux": 8}).flops()
    assert many["AuxK"] == 5 * 2 * 10 * 320 * 262_144  # as it is on one shard, however many
    split = work((1, 2), sae=rare, loss={"auxk_coefficient": 1 / 32, "k_aux": 8}).flops()
    assert split["AuxK"] == 2 * 10 * 320 * 32_768 + 4 * 2 * 10 * 320 * 4  # pairs, half of them here


def table(*args, **kwargs) -> dict[str, tuple]:
    rows = expected_collectives(work(*args, **kwargs))
    return {row.name: (row.kind, row.axis, row.calls, row.bytes) for row in rows}


def test_rows_moved_in_memory():
    """The same 128 pairs, ten wide, in bfloat16; sums are read and written in float32."""
    summed = Estimate(work((2, 5), mesh={"data_exchange": "gradients"})).traffic()["sparse rows"]
    assert summed == 1280 * (2 + 8) + 1280 * (2 + 2) + 2 * 1280 * (2 + 8)
    sent = Estimate(work((2, 5), mesh={"data_exchange": "codes"})).traffic()["sparse rows"]
    assert sent == summed + 2 * 1280 * (2 + 8)  # the other data row's outer products


def test_collectives_over_latents():
    """Two microbatches of 160 tokens, ten wide, in bfloat16 where nothing is summed."""
    found = table((1, 4), train={"microbatch_size": 160})
    offered = work((1, 4)).spec.loss.main.capacity
    assert found == {
        "tokens": ("all-gather", "latent", 2, 2 * 160 * 10 * 2),
        "candidates": ("all-to-all", "latent", 2, 2 * 160 * offered * 4),
        "kept counts": ("all-to-all", "latent", 2, 2 * 160 * 4),
        "reconstruction": ("reduce-scatter", "latent", 2, 2 * 160 * 10 * 4),
        "residual": ("all-gather", "latent", 2, 2 * 160 * 10 * 2),
        "sums": ("all-reduce", "latent", 3, 10 * 4 + 28),
    }
    gathered = table((1, 4), topk={"exchange": "all_gather"})["candidates"]
    assert gathered == ("all-gather", "latent", 1, 320 * 4 * offered * 4)


def test_a_tpu_scatters_whole_tiles_alone():
    for tokens, kind in ((160, "reduce-scatter"), (16, "all-reduce")):  # 40 and 4 to each device
        found = table((1, 4), "v5e:2x2", train={"microbatch_size": tokens})
        assert found["reconstruction"][0] == kind


def test_collectives_over_data():
    found = table((4, 1), mesh={"data_exchange": "gradients", "mesh_shape": (4, 1)})
    assert found["gradients over data"][1::2] == ("data", 4 * (2 * 1000 * 10 + 1000))
    assert found["fired"] == ("all-reduce", "data", 1, 4 * 1000)
    codes = table((4, 1), mesh={"data_exchange": "codes", "mesh_shape": (4, 1)})
    assert "gradients over data" not in codes and codes["codes over data"][1] == "data"


@pytest.mark.parametrize("exchange", ["gradients", "codes"])
def test_the_gradients_of_auxk_are_summed_over_data_in_either_exchange(exchange):
    loss = {"auxk_coefficient": 1 / 32, "k_aux": 8}
    found = table((4, 1), mesh={"data_exchange": exchange}, loss=loss)
    # 50 of 1000 latents dead: a block of 64, whose rows of both matrices and biases are summed.
    expected = ("all-reduce", "data", 3, 4 * (64 * 10 + 64 * 10 + 64))
    assert found["auxk gradients over data"] == expected
    assert ("gradients over data" in found) == (exchange == "gradients")


def test_one_device_has_no_collectives():
    assert table() == {}


def test_auxk_exchanges_again():
    found = table((1, 4), loss={"auxk_coefficient": 1 / 32, "k_aux": 8})
    for name in ("tokens", "reconstruction", "residual"):
        assert found[f"auxk {name}"] == found[name]


def test_auxk_exchanges_in_blocks_the_last_of_which_is_smaller(monkeypatch):
    """17 tokens of each device in blocks of 6, 6 and 5: no byte more, but three times the calls."""
    loss = {"auxk_coefficient": 1 / 32, "k_aux": 8}
    changes = {"train": {"batch_size": 68, "tokens": 680}, "loss": loss}
    whole = table((1, 4), **changes)
    monkeypatch.setattr(encode_xla, "_BLOCK_BYTES_ELSEWHERE", 32 * 4 * 64)  # 32 tokens, 64 latents
    found = table((1, 4), **changes)
    for name in ("tokens", "candidates", "kept counts", "reconstruction", "residual"):
        kind, axis, calls, size = whole[f"auxk {name}"]
        assert found[f"auxk {name}"] == (kind, axis, 3 * calls, size)


def test_time_is_the_sum_of_its_parts_and_above_its_floors():
    estimate = Estimate(work((1, 4)))
    assert estimate.step_seconds == sum(estimate.seconds.values())
    assert max(estimate.floors.values()) < estimate.step_seconds
    assert estimate.tokens_per_second == 320 / estimate.step_seconds


def test_the_text_for_present_devices():
    text = plan.report(dataclasses.replace(RECIPE, mesh=MeshConfig(mesh_shape=(2, 5))))
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
    assert re.search(rf"^  total +{PARAMETERS:,}$", text, re.MULTILINE)
    assert re.search(r"^  encoder forward +20,000$", text, re.MULTILINE)
    assert "milliseconds" not in text  # nobody knows what this CPU does


def test_the_text_for_absent_hardware():
    recipe = dataclasses.replace(RECIPE, mesh=MeshConfig(mesh_shape=(1, 8)), sae=SAE)
    text = plan.report(recipe, "gpu:A100x8")
    for line in (
        "mesh        data 1 x latent 8 = 8 devices",
        "hardware    8 x A100: ",
        "source      analytic: no compiler for A100 is known (of GPUs, for H100)",
        "collectives, per device and step (analytic, 5% of the latents dead)",
        "memory      fits: the estimate takes ",
        "floors      arithmetic ",
        "speed       ",
        "search      ",
        "recommended (analytic)\n  Mesh.mesh_shape = (",
    ):
        assert f"\n{line}" in f"\n{text}", line
    assert text.count("(configured)") == 1
    assert "8 x 1" in text and "2 x 4" in text  # alternatives


def test_what_does_not_fit_is_said():
    huge = dataclasses.replace(SAE, d_model=2**14, n_latents=2**24, k=4)
    recipe = dataclasses.replace(RECIPE, sae=huge, mesh=MeshConfig(mesh_shape=(1, 8)))
    text = plan.report(recipe, "gpu:H100x8")
    assert "memory      DOES NOT FIT: the estimate takes " in text
    assert "recommended none: NOTHING FITS" in text
    assert "Mesh.mesh_shape =" not in text


def test_what_a_compiler_for_gpus_is_installed_with(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    recipe = dataclasses.replace(RECIPE, mesh=MeshConfig(mesh_shape=(1, 8)))
    text = plan.report(recipe, "gpu:H100x8")
    assert "no compiler for H100 is installed (pip install .[cuda13])" in text
    text = plan.report(recipe, "v5e:2x4")
    assert "no compiler for v5e is installed (pip install .[tpu])" in text


def compiled(**changes) -> Compiled:
    numbers = {"arguments": 1, "temporaries": 1, "peak": 2, "live": 2, "seconds": 3.0}
    return Compiled(**numbers, **{"collectives": [], "unread": ""} | changes)


def test_times_are_of_the_expected_case_whatever_was_compiled(monkeypatch):
    """A compiled program has every latent dead: its bytes fill the table and nothing else."""
    recipe = dataclasses.replace(RECIPE, mesh=MeshConfig(mesh_shape=(1, 8)))
    module = importlib.import_module("saejax.plan.report")
    heavy = Collective(name="x", kind="all-gather", axis="latent", calls=1, bytes=1e11)

    def planned(result) -> str:
        monkeypatch.setattr(module, "devices_of", lambda target: [])
        monkeypatch.setattr(module, "compile_step", lambda *args: result)
        return plan.report(recipe, "v5e:2x4")

    text = planned(compiled(collectives=[heavy]))
    assert "(compiled, all latents dead, times by these bytes)" in text
    assert re.search(r"^  x +all-gather +latent +1 +100,000.000", text, re.MULTILINE)
    unread = planned(compiled(collectives=None, unread="the reason"))
    assert "its collectives could not be read (the reason)" in unread
    assert re.search(r"^  tokens +all-gather", unread, re.MULTILINE)
    assert text[text.index("milliseconds") :] == unread[unread.index("milliseconds") :]


def test_auto_is_resolved_first():
    text = plan.report(dataclasses.replace(RECIPE, mesh=MeshConfig()), "gpu:H100x8")
    assert re.match(r"mesh        data \d x latent \d = 8 devices\n", text)


def test_a_mesh_of_another_size_names_those_that_fit():
    recipe = dataclasses.replace(RECIPE, mesh=MeshConfig(mesh_shape=(1, 4)))
    with pytest.raises(ValueError, match=r"takes 4 devices.*has 8; use one of \(1, 8\), \(2, 4\)"):
        plan.report(recipe, "gpu:H100x8")


def test_a_topology_without_a_dry_run_is_refused():
    with pytest.raises(ValueError, match=r"--topology=v5p:8x8x8 plans .* add --dry_run"):
        plan.only_cpus("v5p:8x8x8", dry_run=False)


def test_more_forced_devices_than_jax_started_with():
    jax.devices()
    with pytest.raises(ValueError, match="JAX started already with 8 CPU devices"):
        plan.only_cpus("cpu:9")
    plan.only_cpus("cpu:4")  # the first four


@pytest.mark.parametrize(
    ("d_model", "expected"), [(2, 1), (3, 2), (4, 2), (192, 128), (768, 512), (12_288, 8192)]
)
def test_k_aux_is_the_power_of_two_nearest_half_the_width(d_model, expected):
    assert LossConfig().resolve_k_aux(d_model, 10**6) == expected
    assert LossConfig().resolve_k_aux(d_model, 1) == 1
