"""The sparse kernels, assembled for an H200 that is not here: registers, memory of both kinds."""

import pytest

from pallas_kernels import shapes
from tests.aot import gpu
from tests.kernels import gpu_calls

gpu.require()

_ADDED = ("weight_grads with totals", "weight_grads_of_pairs with totals")  # as a step calls them
_TRAINING = ("decode_loss", "weight_grads", "row_update", "weight_grads_update", *_ADDED)
_SHARDED = ("dense_sparse_matmul", "matmul_at_sparse_indices")
_CASES = [(op, name) for op in _TRAINING for name in ("gpt2_32k", "wide_128k", "pod_shard")]
_CASES += [(op, name) for op in _SHARDED for name in ("gpt2_32k", "pod_shard")]


def compiled(name, op):
    call, args = gpu_calls.calls(shapes.NAMED[name])[op]
    return gpu.compile_for_gpu(call, *args)


@pytest.mark.parametrize("op, name", _CASES)
def test_kernels_fit(op, name):
    """Registers suffice, and no temporary is a gathered `[P, D]` or a dense `[B, L]`."""
    shape, program = shapes.NAMED[name], compiled(name, op)
    program.assert_fits()
    print(name, op, f"{program.temp_bytes / 1e6:.1f} MB of temporaries")
    pairs = shape.tokens * shape.k
    # Lists of pairs while they are sorted, and float32 sums of pieces for both matrices.
    assert program.temp_bytes < 40 * pairs + 8 * shape.d * (2 * pairs / 512 + 1) + 2**20


@pytest.mark.parametrize("op", ["row_update", "weight_grads with totals", "weight_grads_update"])
def test_state_is_updated_in_place_and_gradients_stay_on_the_chip(op):
    shape, program = shapes.NAMED["wide_128k"], compiled("wide_128k", op)
    assert "output_to_operand_aliasing" in program.text
    assert program.temp_bytes < shape.n * shape.d  # a float32 matrix has four times as many bytes
