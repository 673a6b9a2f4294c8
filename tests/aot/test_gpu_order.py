"""Nothing compiled for a GPU adds in an order that depends on timing.

XLA on a GPU carries out a scatter-add with atomic additions unless it is told that no two of them
meet. What it does tell apart itself, reductions and products, has one order on every run.
"""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAEConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import KernelConfig
from saejax.train.state import abstract_state
from saejax.train.step import jit_step, make_step
from tests.aot import gpu

gpu.require()

TOKENS, D, N = 512, 128, 8192

# Mesh, k (many make a dense code), exchange over 'data', implementation; all with AuxK, Multi-TopK.
STEPS = {
    "rows": ((1, 1), 8, "auto", None),
    "gathered pairs": ((2, 4), 8, "codes", None),
    "pairs without kernels": ((2, 4), 8, "gradients", "xla"),
    "dense codes": ((1, 4), 64, "auto", None),
}


def compiled_step(shape, k, exchange, implementation) -> str:
    """The optimized program of a training step."""
    sae, optimizer = SAEConfig(d_model=D, n_latents=N, k=k), OptimizerConfig()
    # Few sizes of AuxK's block: each is a branch, and they take most of the time.
    loss = LossConfig(k_aux=N // 4, multi_topk_coefficient=1 / 8)
    shape = mesh_lib.MeshShape(*shape)
    mesh = mesh_lib.make_mesh(shape, gpu.devices(shape.size))
    step = make_step(
        *(sae, loss, optimizer, TopKConfig(), Normalizer(), mesh),
        batch_tokens=TOKENS,
        chunks=2,
        steps=10,
        data_exchange=exchange,
        kernels=KernelConfig(implementation=implementation),
    )
    x = jax.ShapeDtypeStruct((TOKENS, D), jnp.bfloat16)
    state = abstract_state(sae, optimizer, 10)
    return jit_step(step, state, mesh).lower(state, x).compile().as_text()


@pytest.mark.parametrize("name", STEPS)
def test_a_step_adds_in_one_order(name):
    assert gpu.unordered_scatters(compiled_step(*STEPS[name])) == []


def sums(*outputs) -> jax.Array:
    return sum(jnp.sin(output).sum() for output in outputs)


def of_pairs(values, indices, w, a):
    pairs = pk.pair_list.compact(values > 0, values, indices, N)
    d_values = pk.pair_list.dot(pairs, a, w)
    decoded = pk.pair_list.decode(pairs, w, TOKENS)
    added = pk.pair_list.add_outer(w, pairs, a)
    return decoded, added, pk.weight_grads_of_pairs(pairs, d_values, a, a, N, implementation="xla")


# Of values, indices, w and a; whatever the kernels, and gradients by their own backward passes.
OPERATIONS = {
    "weight_grads": lambda v, i, w, a: pk.weight_grads(v, v, i, a, a, N, implementation="xla"),
    "pairs": of_pairs,
    "gradients of topk_encode": lambda v, i, w, a: jax.grad(
        lambda a, w, b: sums(pk.topk_encode(a, w, b, 8).values_BK), (0, 1, 2)
    )(a, w, w[:, 0]),
    "gradients of dense_sparse_matmul": lambda v, i, w, a: jax.grad(
        lambda v, w: sums(pk.dense_sparse_matmul(v, i, w)), (0, 1)
    )(v, w),
    "gradients of matmul_at_sparse_indices": lambda v, i, w, a: jax.grad(
        lambda a, w: sums(pk.matmul_at_sparse_indices(a, w, i)), (0, 1)
    )(a, w),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_adds_in_one_order(name):
    S = jax.ShapeDtypeStruct
    code, w, a = (TOKENS, 8), S((N, D), jnp.float32), S((TOKENS, D), jnp.float32)
    arrays = (S(code, jnp.float32), S(code, jnp.int32), w, a)
    text = gpu.compile_for_gpu(OPERATIONS[name], *arrays).text
    assert " scatter(" in text and gpu.unordered_scatters(text) == []


def test_a_sum_without_an_order_would_be_found():
    S = jax.ShapeDtypeStruct
    arrays = (S((N, D), jnp.float32), S((TOKENS,), jnp.int32), S((TOKENS, D), jnp.float32))
    text = gpu.compile_for_gpu(lambda w, places, rows: w.at[places].add(rows), *arrays).text
    assert len(gpu.unordered_scatters(text)) == 1
