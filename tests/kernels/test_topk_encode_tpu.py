"""The encoder kernel for TPUs, interpreted, against the plain definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.topk_encode import mosaic_tpu
from pallas_kernels.topk_encode.vjp import topk_encode
from tests.kernels.tpu_interpreter import interpreter

F32, LANES = jnp.float32, 128
TOKENS, D, N, K = 40, 512, 1100, 5


@pytest.fixture(scope="module")
def encode():
    """The kernel with two tiles of tokens, in two blocks, three of latents, two to a group."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(mosaic_tpu, "_MOST_TOKENS", 32)
        monkeypatch.setattr(mosaic_tpu, "_MOST_SLICES", 4)
        monkeypatch.setattr(mosaic_tpu, "_SIZES", (8,))
        monkeypatch.setattr(mosaic_tpu, "_TILE_BYTES", 1024)
        monkeypatch.setattr(mosaic_tpu, "_SKETCH_BYTES", 1)
        yield interpreter(topk_encode, static_argnums=(3,))


def whole(rng, shape, most, dtype=F32):
    """Whole numbers, so small that their products' sums are exact in any order."""
    return rng.integers(-most, most + 1, shape).astype(dtype)


def inputs(kind: str):
    rng = np.random.default_rng(3)
    x, w, b = whole(rng, (TOKENS, D), 30), whole(rng, (N, D), 30), whole(rng, N, 50)
    if kind == "tied":
        x, w, b = whole(rng, (TOKENS, D), 1) * (np.arange(D) < 4), whole(rng, (N, D), 1), 0 * b
    if kind == "crowded":  # one token's three largest in one group
        w[: 3 * LANES : LANES] = 30 * np.sign(x[3])
    if kind == "equal":
        x, b = 0 * x, 0 * b - 1
    if kind == "masked":  # fewer than k are wanted
        b[np.arange(N) % 400 != 7] = -np.inf
    if kind == "few":
        b[rng.random(N) < 0.9] = -np.inf
    if kind == "nan":
        x[3, 5], w[700, 9], w[1099, 1], b[20] = np.nan, np.nan, np.inf, np.nan
    dtype = jnp.bfloat16 if kind == "crowded" else F32
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(b)


# Kind -> tokens that are selected again.
REDONE = {"random": 0, "crowded": 1, "few": 0, "tied": TOKENS, "equal": TOKENS, "masked": TOKENS,
          "nan": TOKENS}  # fmt: skip


@pytest.mark.parametrize("kind", REDONE)
def test_topk_encode(encode, kind):
    arrays = inputs(kind)
    got, want = encode(*arrays, K), topk_encode(*arrays, K, "reference")
    np.testing.assert_array_equal(got.values_BK, want.values_BK)
    np.testing.assert_array_equal(got.indices_BK, want.indices_BK)
    assert got.indices_BK.dtype == jnp.int32
    assert int(got.fallback_tokens) == REDONE[kind]


def test_every_latent_kept(encode):
    """Few latents, so few that a tile is not full, and k = n."""
    x, w, b = inputs("random")
    arrays = x[:32], w[:2], b[:2]
    got, want = encode(*arrays, 2), topk_encode(*arrays, 2, "reference")
    np.testing.assert_array_equal(got.values_BK, want.values_BK)
    np.testing.assert_array_equal(got.indices_BK, want.indices_BK)


@pytest.mark.parametrize(
    "d, n, k, reason",
    [
        (100, 4096, 8, r"d = 100, the width of x_BD, is not a multiple of 128"),
        (128, 32768, 513, r"k = 513, and the kernel takes 512 at most"),
        (128, 8192, 512, r"k = 512 of n = 8192 is so many"),
    ],
)
def test_what_it_cannot_run(d, n, k, reason):
    x, w, b = jnp.zeros((8, d)), jnp.zeros((n, d)), jnp.zeros(n)
    with dispatch.target("tpu", "TPU v5"), pytest.raises(NotImplementedError, match=reason):
        topk_encode(x, w, b, k, "mosaic_tpu")
