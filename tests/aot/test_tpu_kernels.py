"""The kernels for TPUs, compiled for chips that are not here; needs the `tpu` extra."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import dispatch
from pallas_kernels.shapes import NAMED, Shape
from saejax.plan.compiled import devices_of
from saejax.plan.hardware import parse_topology
from tests.kernels.tpu_calls import KINDS, OPS, call, donated

pytest.importorskip("libtpu")

MIB = 2**20
# `weight_grads` sorts, which takes long to compile, and goes on as `weight_grads_of_pairs`.
QUICK = [op for op in OPS if op != "weight_grads"]
SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def temporaries(op: str, shape: Shape, dtype, chip: str) -> int:
    """Compiles one call; bytes that it needs beside its arguments and its result."""
    device = devices_of(parse_topology(SLICES[chip]))[0]
    assert device.device_kind == KINDS[chip]
    fn, args = call(op, shape, dtype)
    here = SingleDeviceSharding(device)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), args)
    jitted = jax.jit(fn, donate_argnums=donated(op), out_shardings=here)
    with dispatch.target("tpu", KINDS[chip]):
        lowered = jitted.lower(*args)
    compiled = lowered.compile()
    assert "tpu_custom_call" in compiled.as_text()
    memory = compiled.memory_analysis()
    if donated(op):
        state = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(args[0]))
        assert memory.alias_size_in_bytes >= state
    return memory.temp_size_in_bytes


def bound(op: str, shape: Shape) -> int:
    """Bytes that the wrappers of a bfloat16 call mean to use: words of rows, sketches, indices."""
    pairs = shape.tokens * shape.k
    return {
        # Pre-activations of a block that is redone, thrice while they are selected from: fixed.
        "topk_encode": 3 * 2**27,
        "decode_loss": 2 * shape.n * shape.d + 4 * pairs,
        "weight_grads": 4 * shape.tokens * shape.d + 64 * pairs,
        "weight_grads_of_pairs": 4 * shape.tokens * shape.d,
        "row_update": 0,
    }[op] + 4 * MIB


@pytest.mark.parametrize("chip", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_a_shard_of_sixteen_million_latents(op, chip):
    """On 512 chips, a block of tokens at a time: no chip's memory is strained by it."""
    shape = NAMED["pod_shard"]
    assert temporaries(op, shape, jnp.bfloat16, chip) <= bound(op, shape)


@pytest.mark.parametrize("op", QUICK)
def test_a_large_batch(op):
    """Nothing `[B, n]` or `[B, k, d]`: 17 and 6.4 GB in float32 and bfloat16."""
    shape = NAMED["gpt2_32k"]
    assert temporaries(op, shape, jnp.bfloat16, "v5p") <= bound(op, shape)


@pytest.mark.parametrize("op", ["decode_loss", "weight_grads_of_pairs"])
@pytest.mark.parametrize("shape", ["wide_128k", "quickstart"])
def test_float32(op, shape):
    """Rows of float32 are gathered where they are: no copy of the matrix is made."""
    shape = NAMED[shape]
    beside = 0 if op == "decode_loss" else 8 * shape.tokens * shape.d
    small = 8 * shape.tokens * shape.k
    assert temporaries(op, shape, jnp.float32, "v6e") <= beside + small + 4 * MIB


# Widths that are no multiple of 256 or of 512, k that fills no register, n and B that no tile does.
ODD = [
    Shape(d=640, n=4090, k=33, tokens=1001, k_aux=0),
    Shape(d=128, n=1100, k=5, tokens=300, k_aux=0),
    Shape(d=1408, n=70_000, k=7, tokens=77, k_aux=0),
]


@pytest.mark.parametrize("op", QUICK)
def test_odd_shapes(op):
    for shape in ODD[: 1 if op == "topk_encode" else None]:
        temporaries(op, shape, jnp.bfloat16, "v5e")
