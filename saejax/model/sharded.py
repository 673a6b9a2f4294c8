"""Encode and decode with latents split over a mesh: exact, and no device sees all of them.

What the module `SAE` uses where its weights are sharded. Results are the same on every device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saejax import collectives
from saejax import mesh as mesh_lib
from saejax.model import sparse
from saejax.types import Params


# Both are compiled as a whole: step by step, every line of them would be a program of its own.
@functools.partial(jax.jit, static_argnames=("k", "dtype", "mesh"))
def encode_top_k(
    x_BD: jax.Array, params: Params, k: int, dtype: jnp.dtype, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """`sparse.encode_top_k` over latent shards: values and global indices `[B, k]`.

    Exact whatever the capacity was that the model was trained with: every shard offers min(k, its
    latents) candidates. Differentiable.
    """
    shards = mesh_lib.shape_of(mesh).latent
    padding = -len(x_BD) % shards or shards * (len(x_BD) == 0)
    encode = mesh_lib.per_device(
        functools.partial(_encode_local, k=k, dtype=dtype),
        mesh,
        in_trees=("replicated", "w_enc", "latent_bias", "pre_bias"),
        out_trees=("replicated", "replicated"),
    )
    values_BK, indices_BK = encode(
        jnp.pad(x_BD, ((0, padding), (0, 0))),
        params["w_enc"],
        params["latent_bias"],
        params["pre_bias"],
    )
    return values_BK[: len(x_BD)], indices_BK[: len(x_BD)]


def _encode_local(x_BD, w_enc_LD, latent_bias_L, pre_bias_D, k: int, dtype: jnp.dtype):
    offered = min(k, len(w_enc_LD))
    values_BC, indices_BC = sparse.encode_top_k(
        x_BD, w_enc_LD, latent_bias_L, pre_bias_D, offered, dtype
    )
    return collectives.merge_top_k(values_BC, indices_BC, len(w_enc_LD), k)


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def decode(
    values_BK: jax.Array, indices_BK: jax.Array, w_dec_LD: jax.Array, dtype: jnp.dtype, mesh: Mesh
) -> jax.Array:
    """`sparse.decode` over latent shards: `[B, D]`, without pre_bias."""
    run = mesh_lib.per_device(
        functools.partial(_decode_local, dtype=dtype),
        mesh,
        in_trees=("replicated", "replicated", "w_dec"),
        out_trees="replicated",
    )
    return run(values_BK, indices_BK, w_dec_LD)


def _decode_local(values_BK, indices_BK, w_dec_LD, dtype: jnp.dtype):
    n_latents = len(w_dec_LD)
    own_BK = indices_BK - collectives.shard_index() * n_latents
    here_BK = (own_BK >= 0) & (own_BK < n_latents)
    partial_BD = sparse.dense_sparse_matmul(
        jnp.where(here_BK, values_BK, 0), jnp.where(here_BK, own_BK, 0), w_dec_LD.astype(dtype)
    )
    return collectives.sum_over_latents(partial_BD)
