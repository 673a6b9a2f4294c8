"""Calls of every operation with a kernel for TPUs, at a named shape; nothing is allocated."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_loss.api import decode_loss
from pallas_kernels.pair_list.pairs import Pairs
from pallas_kernels.row_update.api import RowScalars, RowSettings, row_update
from pallas_kernels.shapes import Shape
from pallas_kernels.topk_encode.vjp import topk_encode
from pallas_kernels.weight_grads.api import WeightGrads, weight_grads, weight_grads_of_pairs

# TPU -> its device kind.
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
OPS = ("topk_encode", "decode_loss", "weight_grads", "weight_grads_of_pairs", "row_update")

_SETTINGS = RowSettings(
    beta1=0.9, beta2=0.999, epsilon=1e-8, ema_decay=0.999, project=True, unit_norm=True
)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def call(op: str, shape: Shape, dtype: Any) -> tuple[Callable, tuple]:
    """The operation by its kernel, and its arguments, as a training step in `dtype` has them.

    Those that the result may take the place of come first; see `donated`.
    """
    d, n, k, tokens = shape.d, shape.n, shape.k, shape.tokens
    w, x, latents = array(n, d), array(tokens, d, dtype=dtype), array(n)
    values, indices = array(tokens, k), array(tokens, k, dtype=jnp.int32)
    totals = WeightGrads(w, w, latents)
    if op == "topk_encode":
        return lambda *args: topk_encode(*args, k, "mosaic_tpu"), (
            x,
            array(n, d, dtype=dtype),
            latents,
        )
    if op == "decode_loss":
        fn = functools.partial(decode_loss, implementation="mosaic_tpu")
        return fn, (values, indices, array(n, d, dtype=dtype), x)
    if op == "weight_grads":
        return _adding_to_totals(weight_grads, n), (totals, values, values, indices, x, x)
    if op == "weight_grads_of_pairs":
        flat, where = array(tokens * k), array(tokens * k, dtype=jnp.int32)
        pairs = Pairs(flat, where, where, array(dtype=jnp.int32))
        return _adding_to_totals(weight_grads_of_pairs, n), (totals, pairs, flat, x, x)
    settled = {"settings": _SETTINGS, "copy_dtype": jnp.bfloat16, "implementation": "mosaic_tpu"}
    scalars = RowScalars(array(), array(dtype=jnp.int32), array())
    return lambda state, g, scalars: _update(state, g, scalars, settled), ((w, w, w, w), w, scalars)


def donated(op: str) -> tuple[int, ...]:
    return () if op in ("topk_encode", "decode_loss") else (0,)


def _adding_to_totals(op: Callable, n: int) -> Callable:
    return lambda totals, *args: op(*args, n, totals=totals, implementation="mosaic_tpu")


def _update(state, g, scalars, settled):
    w, mu, nu, ema = state
    return row_update(w, g, mu, nu, ema, scalars, **settled)
