"""Encoder and top-k compiled for a GPU that is not here; skipped without the wheels for it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import shapes
from pallas_kernels.topk_encode.vjp import topk_encode
from tests.aot import gpu

gpu.require()


def compiled(shape: shapes.Shape) -> gpu.Compiled:
    S = jax.ShapeDtypeStruct
    return gpu.compile_for_gpu(
        functools.partial(topk_encode, k=shape.k, implementation="mosaic_gpu"),
        S((shape.tokens, shape.d), jnp.bfloat16),
        S((shape.n, shape.d), jnp.bfloat16),
        S((shape.n,), jnp.float32),
    )


@pytest.mark.parametrize("name", shapes.NAMED)
def test_topk_encode(name):
    """No spills; memory far below that of the pre-activations; groups selected, not sorted."""
    shape = shapes.NAMED[name]
    program = compiled(shape)
    program.assert_fits()
    print(f"{name}: {program.temp_bytes / 2**20:.0f} MiB beside arguments and results")
    assert program.temp_bytes < 2**30
    assert f"f32[{shape.tokens},{shape.n}]" not in program.text
    # The candidates of all tokens, and the fallback's: few tokens, or already chosen groups.
    rows = [
        tuple(map(int, r)) for r in re.findall(r"= \(\w+\[(\d+),(\d+)\].* sort\(", program.text)
    ]
    assert rows, "no sort was found"
    assert all(width == 2 * shape.k or count <= 1024 for count, width in rows), rows
