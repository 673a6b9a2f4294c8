"""Where dense codes begin, and that it is told."""

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk


@pytest.mark.parametrize(
    "platform, kind, ratio",
    [
        ("cpu", "cpu", 24),
        ("gpu", "NVIDIA H100 80GB HBM3", 184),
        ("gpu", "NVIDIA H200", 184),
        ("gpu", "NVIDIA A100-SXM4-80GB", 184),
        ("tpu", "TPU v5 lite", 240),
        ("tpu", "TPU v5e", 240),
        ("tpu", "TPU v5", 166),
        ("tpu", "v5p", 166),
        ("tpu", "TPU v4", 184),
        ("tpu", "", 184),
    ],
)
def test_the_crossover_is_of_the_device(platform, kind, ratio):
    assert pk.dense_below(platform, kind) == ratio
    with pk.target(platform, kind):
        assert pk.dense_below() == ratio
        assert pk.code_layout(32, 32 * ratio) == pk.code_layout(32, 32 * ratio, 4) == "dense"
        assert pk.code_layout(32, 32 * ratio + 1) == "rows"
        assert pk.code_layout(32, 32 * ratio + 1, 4) == "pairs"


def test_the_layout_is_explained():
    def said(k, n, shards):
        def picks(x):
            pk.code_layout(k, n, shards, 184)
            return x

        return pk.explain(picks, jax.ShapeDtypeStruct((2,), jnp.float32))

    assert said(32, 5888, 1) == "codes: dense, because n = 5888 <= 184 k, k = 32"
    assert said(32, 5889, 1) == "codes: rows, because n = 5889 > 184 k, k = 32"
    assert said(32, 2**20, 8) == "codes: pairs, because n = 1048576 over 8 shards > 184 k, k = 32"
