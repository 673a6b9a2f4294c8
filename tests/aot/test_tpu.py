"""The step compiled for TPUs that are not here; needs the `tpu` extra, skipped without it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from saejax import config
from saejax import mesh as mesh_lib
from saejax.mesh import MeshConfig, MeshShape
from saejax.model.sae import SAEConfig
from saejax.plan.compiled import Compiled, Refused, devices_of
from saejax.plan.estimate import Estimate
from saejax.plan.hardware import parse_topology
from saejax.plan.report import compile_for, report
from saejax.plan.traffic import expected_collectives
from saejax.plan.workload import Workload
from saejax.recipe import Recipe
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.state import abstract_state, params_creator

pytest.importorskip("libtpu")

# Without AuxK, whose branches take most of the time that compiling takes.
RECIPE = Recipe(
    sae=SAEConfig(d_model=512, n_latents=65_536, k=32),
    train=TrainConfig(tokens=2**17, batch_size=2**15, microbatch_size=4096),
    loss=LossConfig(auxk_coefficient=0),
    optimizer=OptimizerConfig(ema_decay=None),
    mesh=MeshConfig(mesh_shape=(1, 4)),
)


SCALARS = {"sums", "auxk sums", "gradient norm", "scalars"}


def compiled(recipe, topology: str) -> tuple[Workload, Compiled | Refused]:
    """As `--dry_run --topology=...` does it."""
    target = parse_topology(topology)
    work = Workload(recipe, MeshShape(*recipe.mesh.mesh_shape), target)
    return work, compile_for(Estimate(work), devices_of(target))


def rows(collectives) -> set[tuple]:
    return {
        (c.name, c.kind, c.axis, c.calls, c.bytes) for c in collectives if c.name not in SCALARS
    }


def totals(collectives) -> dict[tuple, float]:
    """Bytes by name, kind and axis: the compiler may make one call of several."""
    return {(name, kind, axis): size for name, kind, axis, _, size in rows(collectives)}


def test_the_compiled_step_is_the_planned_one():
    work, result = compiled(RECIPE, "v5e:2x2")
    assert not result.unread
    expected = expected_collectives(work)
    assert rows(result.collectives) == rows(expected)
    # The compiler merges the sums, and adds those of the gradient's norm to them.
    small, planned = (
        sum(c.bytes for c in found if c.name in SCALARS) for found in (result.collectives, expected)
    )
    assert planned <= small <= planned + 64
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


SHIPPED = "gin/gpt4_16m.gin"
LARGEST = "v5p:8x8x8"


def shipped() -> Recipe:
    experiment, _, _ = config.load_experiment([SHIPPED], [])
    return experiment.recipe()


def test_sixteen_million_latents_on_512_chips():
    """The shipped file, compiled for the slice it names: a minute or two."""
    work, result = compiled(shipped(), LARGEST)
    estimate = Estimate(work)
    assert isinstance(result, Compiled) and not result.unread
    assert result.peak < work.topology.chip.memory
    assert result.peak == pytest.approx(estimate.peak, rel=0.1)
    expected = expected_collectives(work, largest_auxk=True)
    assert totals(result.collectives) == totals(expected)
    small = sum(c.bytes for c in result.collectives if c.name in SCALARS)
    assert small < 1e6, "a collective that is no scalar hides among them"
    exchanged = {c.name: c.bytes for c in result.collectives}
    assert exchanged["candidates"] + exchanged["kept counts"] <= 4e6


def test_creation_of_sixteen_million_latents_on_512_chips():
    """Little but a device's own shard is held while weights are drawn."""
    recipe, target = shipped(), parse_topology(LARGEST)
    shape = MeshShape(*recipe.mesh.mesh_shape)
    mesh = mesh_lib.make_mesh(shape, devices_of(target))
    sizes = (recipe.sae, recipe.optimizer, recipe.train.steps)
    shardings = mesh_lib.tree_shardings(mesh, abstract_state(*sizes))
    build = jax.jit(params_creator(recipe.sae, mesh), out_shardings=shardings.params)
    arguments = (
        jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct((recipe.sae.d_model,), jnp.float32),
    )
    memory = build.lower(*arguments).compile().memory_analysis()
    shard = sum(Workload(recipe, shape, target).state_bytes.values())
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes <= shard
    assert memory.temp_size_in_bytes <= 0.05 * shard
