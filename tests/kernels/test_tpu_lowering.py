"""The kernels for TPUs, lowered for TPUs at every named shape: nothing runs, no TPU is needed."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.shapes import NAMED
from tests.kernels.tpu_calls import KINDS, OPS, call


@pytest.mark.parametrize("op", OPS)
def test_every_named_shape_lowers(op):
    for name, shape in NAMED.items():
        dtype = jnp.float32 if name == "quickstart" else jnp.bfloat16
        fn, args = call(op, shape, dtype)
        with dispatch.target("tpu", KINDS["v5p"]):
            text = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in text, name


@pytest.mark.parametrize("op", OPS)
def test_float32_lowers(op):
    fn, args = call(op, NAMED["pod_shard"], jnp.float32)
    with dispatch.target("tpu", KINDS["v6e"]):
        jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
