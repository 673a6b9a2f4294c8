"""The plan's memory against what compilers said, within 10 %.

Figures are of jax 0.10.2 with libtpu 0.0.42.1 (TPU) and jax-cuda13-plugin 0.10.2 (GPU, compiled
without one): arguments + temporaries + outputs that take no argument's place, GiB per device.
"""

import dataclasses

import jax
import pytest

from saejax.mesh import MeshConfig, MeshShape
from saejax.model.sae import SAEConfig
from saejax.plan.compiled import compile_step
from saejax.plan.estimate import Estimate
from saejax.plan.hardware import parse_topology
from saejax.plan.workload import Workload
from saejax.recipe import Recipe
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig

LARGE = {"latents": 2**24, "width": 12_288, "k": 256, "block": 8192}
GPT2 = {"latents": 2**17, "width": 768, "k": 32}


def estimate(topology, shape, latents, width, k, block, batch=2**17, ema=True, auxk=True):
    recipe = Recipe(
        sae=SAEConfig(d_model=width, n_latents=latents, k=k),
        train=TrainConfig(tokens=batch, batch_size=batch, microbatch_size=block),
        loss=LossConfig(k_aux=512, auxk_coefficient=1 / 32 if auxk else 0),
        optimizer=OptimizerConfig(ema_decay=0.999 if ema else None),
        mesh=MeshConfig(mesh_shape=shape),
    )
    return Estimate(Workload(recipe, MeshShape(*shape), parse_topology(topology)))


@pytest.mark.parametrize(
    ("topology", "shape", "sizes", "compiled"),
    [
        ("v5p:8x8x8", (1, 512), LARGE, 23.121),
        ("v5e:2x2", (4, 1), GPT2 | {"block": 4096}, 7.714),
        (
            "v5p:2x2x2",
            (1, 8),
            {"latents": 2**18, "width": 1024, "k": 64, "block": 4096, "batch": 2**16},
            2.116,
        ),
        ("gpu:H100x512", (1, 512), LARGE, 24.025),
        ("gpu:H100x8", (2, 4), GPT2 | {"block": 16_384}, 2.310),
        ("gpu:H100x1", (1, 1), GPT2 | {"latents": 2**15, "block": 16_384}, 3.001),
        # The model was not fitted to these.
        ("v5p:8x8x8", (2, 256), LARGE, 51.059),
        ("v5p:4x4x4", (1, 64), LARGE | {"latents": 2**21}, 23.386),
        ("gpu:H100x512", (2, 256), LARGE, 45.026),
    ],
)
def test_the_estimate_is_near_what_was_compiled(topology, shape, sizes, compiled):
    assert estimate(topology, shape, **sizes).peak / 2**30 == pytest.approx(compiled, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 4), {"latents": 2**14, "width": 128, "k": 16, "block": 1024}),
        # Rows are searched by groups, by AuxK not, by none.
        ((1, 4), {"latents": 2**15, "width": 256, "k": 64, "block": 1024}),
        ((1, 4), {"latents": 2**14, "width": 256, "k": 64, "block": 1024}),
        ((1, 1), {"latents": 2**12, "width": 256, "k": 64, "block": 2048, "auxk": False}),
        # AuxK's code is dense.
        ((2, 1), {"latents": 2**13, "width": 64, "k": 16, "block": 2048}),
    ],
)
def test_the_estimate_is_near_what_compiles_here(shape, sizes):
    found = estimate("cpu:8", shape, **sizes, batch=4096)
    loss = dataclasses.replace(found.work.recipe.loss, k_aux=None)
    recipe = dataclasses.replace(found.work.recipe, loss=loss)
    found = Estimate(dataclasses.replace(found.work, recipe=recipe))
    devices = jax.devices()[: found.work.shape.data * found.work.shape.latent]
    compiled = compile_step(recipe, devices, found.work.shape, [])
    assert found.peak == pytest.approx(compiled.peak, rel=0.1)
