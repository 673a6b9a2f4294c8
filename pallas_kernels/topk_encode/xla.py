"""Encoder and top-k over blocks of tokens, for CPU and as the fallback everywhere."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks, dispatch
from pallas_kernels.top_k import xla

# Pre-activations of a block: large enough that the matmul reads the weights few times, small
# enough that they are selected from while still in cache, and count for nothing in memory.
_BLOCK_BYTES = {"cpu": 2**25}
_BLOCK_BYTES_ELSEWHERE = 2**28


def block_tokens(n_latents: int, itemsize: int = 4, platform: str | None = None) -> int:
    """Tokens whose pre-activations a block of `topk_encode` holds at once, as a multiple of 8.

    Args:
      n_latents: of a device.
      itemsize: bytes of a pre-activation.
      platform: None is that of the target in force.

    Raises:
      ValueError: an argument.
    """
    checks.whole("block_tokens", "n_latents", n_latents)
    platform = dispatch.platform_of("block_tokens", platform)
    limit = _BLOCK_BYTES.get(platform, _BLOCK_BYTES_ELSEWHERE)
    return max(limit // (itemsize * n_latents) // 8 * 8, 8)


def topk_encode(x_BD: jax.Array, w_LD: jax.Array, b_L: jax.Array, k: int):
    """See `pallas_kernels.topk_encode.vjp.topk_encode`."""
    dtype = jnp.result_type(x_BD, w_LD, jnp.float32)
    tokens = block_tokens(len(w_LD), dtype.itemsize)

    def block(x_bD):
        h_bL = lax.dot_general(
            x_bD,
            w_LD,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )
        return xla.top_k_of_ordered(xla.ordered(h_bL + b_L), k)

    none = jnp.zeros((), jnp.int32)
    if len(x_BD) <= tokens:
        return *block(x_BD), none
    full = len(x_BD) // tokens * tokens
    values, indices = lax.map(block, x_BD[:full].reshape(-1, tokens, x_BD.shape[1]))
    parts = [(values.reshape(full, k), indices.reshape(full, k))]
    if full < len(x_BD):
        parts.append(block(x_BD[full:]))
    values_BK, indices_BK = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return values_BK, indices_BK, none
