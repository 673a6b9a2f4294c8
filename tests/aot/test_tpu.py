"""The step compiled for TPUs that are not here; needs the `tpu` extra, skipped without it."""

import dataclasses

import pytest

from saejax.mesh import MeshConfig, MeshShape
from saejax.model.sae import SAEConfig
from saejax.plan.compiled import Compiled, Refused, compile_step, devices_of
from saejax.plan.estimate import Estimate
from saejax.plan.hardware import parse_topology
from saejax.plan.report import report
from saejax.plan.traffic import expected_collectives
from saejax.plan.workload import Workload
from saejax.recipe import Recipe
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig

pytest.importorskip("libtpu")

# Without AuxK, whose branches take most of the time that compiling takes.
RECIPE = Recipe(
    sae=SAEConfig(d_model=512, n_latents=65_536, k=32),
    train=TrainConfig(tokens=2**17, batch_size=2**15, microbatch_size=4096),
    loss=LossConfig(auxk_coefficient=0),
    optimizer=OptimizerConfig(ema_decay=None),
    mesh=MeshConfig(mesh_shape=(1, 4)),
)


def compiled(recipe, topology: str) -> tuple[Workload, Compiled | Refused]:
    target = parse_topology(topology)
    work = Workload(recipe, MeshShape(*recipe.mesh.mesh_shape), target)
    expected = expected_collectives(work, largest_auxk=True)
    return work, compile_step(recipe, devices_of(target), work.shape, expected)


def test_the_compiled_step_is_the_planned_one():
    work, result = compiled(RECIPE, "v5e:2x2")
    rows = {(c.name, c.axis, c.calls, c.bytes) for c in expected_collectives(work)}
    found = {(c.name, c.axis, c.calls, c.bytes) for c in result.collectives}
    scalars = {row for row in found if row[0] in ("sums", "gradient norm", "scalars")}
    assert found - scalars == {row for row in rows if row[0] != "sums"}
    assert result.arguments == pytest.approx(
        sum(work.state_bytes.values()) + 2 * work.own_rows * work.width, rel=0.01
    )


def test_what_does_not_fit_is_refused_in_numbers():
    huge = dataclasses.replace(
        RECIPE, sae=dataclasses.replace(RECIPE.sae, n_latents=2**22), mesh=RECIPE.mesh
    )
    work, result = compiled(huge, "v5e:2x2")
    assert not Estimate(work).fits()
    assert isinstance(result, Refused) and result.available == "15.75G"


def test_a_slice_that_does_not_exist():
    with pytest.raises(ValueError, match=r"v5e:3x5: the TPU compiler knows no such slice"):
        report(dataclasses.replace(RECIPE, mesh=MeshConfig(mesh_shape=(1, 15)),
               sae=dataclasses.replace(RECIPE.sae, n_latents=15 * 4096),
               train=TrainConfig(tokens=15 * 4096, batch_size=15 * 1024)), "v5e:3x5")  # fmt: skip
