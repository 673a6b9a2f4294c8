"""A fresh state is made in its shards: nothing holds the whole of it, on the device or the host."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import mesh as mesh_lib
from saejax.model.sae import SAEConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.state import abstract_state, params_creator

# A 1/1024 of 16,777,216 latents of width 12,288: the code and its mesh are the same.
SCALED = SAEConfig(d_model=384, n_latents=524_288, k=32)
OPTIMIZER = OptimizerConfig()


def compiled(sae, shape):
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape(*shape))
    shardings = mesh_lib.tree_shardings(mesh, abstract_state(sae, OPTIMIZER, 10)).params
    build = jax.jit(params_creator(sae, mesh), out_shardings=shardings)
    return build.lower(jax.random.key(0), jnp.zeros(sae.d_model)).compile()


def shard_bytes(sae, latent):
    state = abstract_state(sae, OPTIMIZER, 10)
    specs = mesh_lib.tree_specs(state)
    sizes = jax.tree.map(
        lambda leaf, spec: leaf.size * leaf.dtype.itemsize // (latent if "latent" in spec else 1),
        state,
        specs,
    )
    return sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
def test_a_device_holds_no_more_than_its_shard(shape):
    memory = compiled(SCALED, shape).memory_analysis()
    shard = shard_bytes(SCALED, shape[1])
    # Weights and what drawing them takes, before the optimizer's state exists: the rest is zeros.
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes <= shard


_MEASURE = """
import json, re, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
sys.path.insert(0, sys.argv[1])
import test_creation as t
from saejax.model.sae import SAEConfig
from saejax.train.state import create
sae = SAEConfig(d_model=384, n_latents=131_072, k=32)
mesh = t.mesh_lib.make_mesh(t.mesh_lib.MeshShape(1, 8))
rows = t.np.random.default_rng(0).normal(size=(64, 384))
t.jax.block_until_ready(t.jax.numpy.zeros(8))

def peak():  # of this program alone; getrusage would count its parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak()
jax.block_until_ready(create(0, sae, t.OPTIMIZER, 10, rows, mesh))
print(json.dumps({"grown": peak() - before, "state": 8 * t.shard_bytes(sae, 8)}))
"""


def test_the_host_holds_no_second_copy():
    """All eight shards live in this process, so that it may grow by the state, and little more."""
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    assert 0.9 < measured["grown"] / measured["state"] < 1.3


def test_shards_are_parts_of_the_same_state():
    sae = SAEConfig(d_model=16, n_latents=64, k=4)
    arguments = (jax.random.key(3), jnp.zeros(16))
    whole = compiled(sae, (1, 1))(*arguments)
    split = compiled(sae, (2, 4))(*arguments)
    for name, array in split.items():
        np.testing.assert_allclose(array, whole[name], rtol=1e-5, err_msg=name)
    starts = {shard.index[0].start for shard in split["w_dec"].addressable_shards}
    assert starts == {0, 16, 32, 48}
