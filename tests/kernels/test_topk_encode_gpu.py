"""Encoder and top-k on GPUs: interpreted, against the plain definition; lowered at real shapes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, shapes
from pallas_kernels.topk_encode import mosaic_gpu as kernel
from pallas_kernels.topk_encode import reference
from pallas_kernels.topk_encode.second_stage import POSITION_BITS, Sketch
from pallas_kernels.topk_encode.vjp import topk_encode
from tests.kernels.gpu_interpreter import interpreted  # first: skips where there is none

H200 = dispatch.Target("gpu", "NVIDIA H200")


def operands(tokens, n, d, seed=0):
    """Small whole numbers: their sums are exact in any order, and often equal."""
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(rng.integers(-2, 3, (rows, d)), jnp.bfloat16) for rows in (tokens, n))
    return x, w, jnp.asarray(rng.integers(-3, 4, n), jnp.float32)


def plain_sketch(x, w, b, layout):
    h_BL = np.asarray(x, np.float32) @ np.asarray(w, np.float32).T + np.asarray(b)
    groups = np.arange(len(w) // layout.group_size)[:, None]
    h_BGM = h_BL[:, layout.latent_of(groups, np.arange(layout.group_size))]
    order = np.argsort(-h_BGM, axis=2, kind="stable")
    broken = np.isnan(h_BGM).any(2)
    three = (np.take_along_axis(h_BGM, order[..., i : i + 1], 2)[..., 0] for i in range(3))
    positions = order[..., 0] + (order[..., 1] << POSITION_BITS)
    return Sketch(*(np.where(broken, np.inf, values) for values in three), positions)


# Tiles to a group, pairs of blocks, pieces along tokens and latents, slices of D: rings that wrap
# and rings never filled; warpgroups with several pieces, with one more than others, with none.
LAYOUTS = [(2, 1, 1, 3, 4), (1, 1, 2, 2, 1), (4, 1, 1, 1, 2), (1, 3, 1, 3, 2)]


@pytest.mark.parametrize("tiles, pairs, rows, columns, slices", LAYOUTS)
def test_sketch(tiles, pairs, rows, columns, slices):
    layout = kernel.Layout(tiles, pairs)
    x, w, b = operands(256 * rows, layout.latents * columns, 64 * slices)
    x = x.at[3, 1].set(jnp.nan)
    w = w.at[17, 2].set(jnp.nan)

    def sketch(x, w, b, implementation):
        assert implementation == "mosaic_gpu"
        return kernel.sketch_groups(x, w, b, layout)

    got, want = interpreted(sketch, x, w, b), plain_sketch(x, w, b, layout)
    np.testing.assert_array_equal(got.largest_BG, want.largest_BG)
    np.testing.assert_array_equal(got.second_BG, want.second_BG)
    np.testing.assert_array_equal(got.third_BG, want.third_BG)
    told = np.isfinite(want.largest_BG)
    np.testing.assert_array_equal(got.positions_BG[told], want.positions_BG[told])


def altered(kind):
    x, w, b = operands(300, 500, 128)
    if kind == "all equal":
        x, b = jnp.zeros_like(x), jnp.full_like(b, -0.0)
    if kind in ("distinct", "all negative"):  # hardly any token is redone, which would hide errors
        b = jnp.asarray(np.random.default_rng(1).normal(size=500), jnp.float32)
        b = b - 1000 * (kind == "all negative")
    if kind == "masked":
        b = jnp.where(np.arange(500) % 9 < 7, -jnp.inf, b)
    if kind == "nan token":
        x = x.at[[0, 299], 5].set(jnp.nan)
    if kind == "nan latent":
        w = w.at[499, 0].set(jnp.nan)
    return x, w, b


KINDS = ["ties", "all equal", "all negative", "masked", "nan token", "nan latent", "distinct"]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind):
    """No tile divides the tokens or the latents."""
    x, w, b = altered(kind)
    got, want = interpreted(topk_encode, x, w, b, 5), reference.topk_encode(x, w, b, 5)
    np.testing.assert_array_equal(got.indices_BK, want[1])
    np.testing.assert_array_equal(got.values_BK, want[0])
    assert got.values_BK.dtype == jnp.float32 and got.indices_BK.dtype == jnp.int32
    if kind in ("distinct", "all negative"):
        assert got.fallback_tokens < 60
    if kind in ("all equal", "nan latent"):
        assert got.fallback_tokens == 300


def test_blocks_of_tokens(monkeypatch):
    monkeypatch.setattr(kernel, "_SKETCH_BYTES", 256 * 128)  # of 256 tokens
    x, w, b = operands(300, 128, 64)
    got, want = interpreted(topk_encode, x, w, b, 1), reference.topk_encode(x, w, b, 1)
    np.testing.assert_array_equal(got.indices_BK, want[1])
    np.testing.assert_array_equal(got.values_BK, want[0])


def abstract(tokens, n, d, dtype=jnp.bfloat16):
    S = jax.ShapeDtypeStruct
    return S((tokens, d), dtype), S((n, d), dtype), S((n,), jnp.float32)


@pytest.mark.parametrize("name", shapes.NAMED)
def test_lowers_for_gpus(name):
    shape = shapes.NAMED[name]
    args = abstract(shape.tokens, shape.n, shape.d)
    encode = functools.partial(topk_encode, k=shape.k, implementation="mosaic_gpu")
    with dispatch.target("gpu", "NVIDIA H200"):
        lowered = jax.jit(encode).trace(*args).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "mosaic_gpu" in text
    assert f"tensor<{shape.tokens}x{shape.n}xf32>" not in text


def test_groups_are_as_large_as_the_fallback_allows():
    sizes = {(32768, 32): 32, (131072, 32): 64, (131072, 64): 32, (32768, 6): 64, (8192, 32): 16}
    for (n, k), size in sizes.items():
        assert kernel.Layout(kernel._tiles(n, k), 1).group_size == size
        assert kernel.unsettled_share(n, k, size) < 0.03


def test_blocks_of_every_hopper():
    kinds = {
        "NVIDIA H100 80GB HBM3": 66,
        "NVIDIA H200": 66,
        "NVIDIA H100 PCIe": 57,
        "NVIDIA H20": 39,
    }
    assert {kind: kernel._pairs(kind) for kind in kinds} == kinds


@pytest.mark.parametrize(
    "args, k, reason",
    [
        (abstract(8, 4096, 128, jnp.float32), 4, "rounded to tf32"),
        (abstract(8, 4096, 128, jnp.float64), 4, "must be bfloat16, and are float64"),
        (abstract(8, 4096, 96), 4, "D = 96 must be a multiple of 64"),
        (abstract(0, 4096, 128), 4, "no tokens"),
        (abstract(8, 2**17, 128), 513, "k = 513 must be at most 512"),
        (abstract(8, 64, 128), 64, "k = 64 is too many of 64 latents"),
        (abstract(8, 32768, 128), 512, r"three of the k would meet in one for 533% of the tokens"),
    ],
)
def test_says_what_it_cannot_run(args, k, reason):
    assert re.search(reason, kernel.unsupported(H200, *args, k))
