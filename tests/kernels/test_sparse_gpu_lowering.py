"""The sparse kernels for GPUs lower, without a GPU, at every named shape."""

import jax
import pytest

from pallas_kernels import dispatch, shapes
from tests.kernels import gpu_calls

if jax.__version_info__ < (0, 11):
    pytest.skip("Mosaic GPU needs jax >= 0.11", allow_module_level=True)


def assert_lowers(shape):
    for op, (call, args) in gpu_calls.calls(shape).items():
        with dispatch.target("gpu", "NVIDIA H200"):
            lowered = jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text(), op


@pytest.mark.parametrize("name", shapes.NAMED)
def test_kernels_lower(name):
    assert_lowers(shapes.NAMED[name])


def test_kernels_lower_where_whole_numbers_have_64_bits():
    with jax.enable_x64(True):
        assert_lowers(shapes.NAMED["quickstart"])
