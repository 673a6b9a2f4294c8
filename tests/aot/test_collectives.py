"""The compiled step talks as the plan's table says, and no more."""

import jax
import pytest

from saejax.mesh import MeshConfig, MeshShape
from saejax.model.sae import SAEConfig
from saejax.plan.compiled import Compiled, compile_step
from saejax.plan.hardware import parse_topology
from saejax.plan.hlo import UNNAMED
from saejax.plan.traffic import expected_collectives
from saejax.plan.workload import Workload
from saejax.recipe import Recipe
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig

SCALARS = {"sums", "auxk sums", "gradient norm", "scalars"}


def compiled(shape, exchange, multi) -> tuple[Workload, Compiled]:
    recipe = Recipe(
        sae=SAEConfig(d_model=64, n_latents=8192, k=16),
        train=TrainConfig(tokens=2048, batch_size=1024, microbatch_size=128),
        loss=LossConfig(k_aux=32, multi_topk_coefficient=multi),
        mesh=MeshConfig(mesh_shape=shape, data_exchange=exchange),
    )
    work = Workload(recipe, MeshShape(*shape), parse_topology("cpu:8"))
    # Nothing is said of what to expect: on CPU every one keeps the name it was traced under.
    return work, compile_step(recipe, jax.devices(), work.shape, [])


@pytest.mark.parametrize(
    ("shape", "exchange", "multi"),
    [((1, 8), "auto", 1 / 8), ((2, 4), "gradients", 0.0), ((2, 4), "codes", 0.0)],
)
def test_exactly_the_collectives_of_the_table(shape, exchange, multi):
    work, result = compiled(shape, exchange, multi)
    expected = expected_collectives(work, largest_auxk=True)
    assert not result.unread and UNNAMED not in {c.name for c in result.collectives}
    found = {(c.name, c.kind, c.axis): c.bytes for c in result.collectives}
    table = {(c.name, c.kind, c.axis): c.bytes for c in expected}
    large = {row: size for row, size in found.items() if row[0] not in SCALARS}
    wanted = {row: size for row, size in table.items() if row[0] not in SCALARS}
    assert set(large) == set(wanted)
    for row, size in wanted.items():
        assert large[row] == pytest.approx(size, rel=0.01), row
    small = sum(size for row, size in found.items() if row[0] in SCALARS)
    assert small < 8 * 4 * 64, "a collective that is no scalar hides among them"
