"""No array of a compiled step grows with tokens times latents, or with pairs times width."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import KernelConfig
from saejax.train.state import abstract_state
from saejax.train.step import jit_step, make_step


def arrays(d, n, k, tokens, chunks=1, **kernels) -> set[tuple[int, ...]]:
    """Shapes of everything in the optimized program, AuxK with every latent dead included."""
    sae, optimizer = SAEConfig(d_model=d, n_latents=n, k=k), OptimizerConfig()
    mesh = mesh_lib.make_mesh(mesh_lib.MeshShape())
    parts = (sae, LossConfig(), optimizer, TopKConfig(), Normalizer(), mesh)
    sizes = {"batch_tokens": tokens, "chunks": chunks, "steps": 10}
    step = make_step(*parts, **sizes, kernels=KernelConfig(**kernels))
    state = abstract_state(sae, optimizer, 10)
    x = jax.ShapeDtypeStruct((tokens, d), jnp.float32)
    text = jit_step(step, state, mesh).lower(state, x).compile().as_text()
    found = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    return {tuple(int(size) for size in shape.split(",")) for shape in set(found)}


def test_large_batches_and_many_latents_need_no_large_arrays():
    """With d = 768, 131,072 latents, k = 32: the largest array is a weight matrix."""
    d, n, k, tokens = 768, 131_072, 32, 8192
    assert n * d < min(tokens * n, tokens * k * d)
    largest = max(arrays(d, n, k, tokens), key=math.prod)
    assert math.prod(largest) <= n * d, largest


@pytest.mark.parametrize("gradients, large", [("sparse", False), ("dense", True)])
def test_a_dense_step_would_be_found(gradients, large):
    shapes = arrays(64, 4096, 32, 4096, gradients=gradients)
    assert any(math.prod(shape) >= 4096 * 4096 for shape in shapes) == large
