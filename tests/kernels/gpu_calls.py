"""The sparse operations by their GPU kernels, and abstract arguments of a named shape."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.decode_loss.api import decode_loss
from pallas_kernels.dense_sparse_matmul.vjp import dense_sparse_matmul
from pallas_kernels.matmul_at_sparse_indices.vjp import matmul_at_sparse_indices
from pallas_kernels.pair_list.pairs import Pairs
from pallas_kernels.row_update.api import RowScalars, RowSettings, row_update
from pallas_kernels.shapes import Shape
from pallas_kernels.weight_grads.api import WeightGrads, weight_grads, weight_grads_of_pairs
from pallas_kernels.weight_grads_update.api import Rows, weight_grads_update

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
_ADAM = {"beta1": 0.9, "beta2": 0.999, "epsilon": 6.25e-10, "ema_decay": 0.999}
_DECODER = RowSettings(**_ADAM, project=True, unit_norm=True)
_ENCODER = RowSettings(**_ADAM)


def calls(shape: Shape) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """Every operation as a function of arrays, with bfloat16 operands and float32 state."""
    S = jax.ShapeDtypeStruct
    code = (shape.tokens, shape.k)
    values, indices = S(code, F32), S(code, I32)
    w, a = S((shape.n, shape.d), BF16), S((shape.tokens, shape.d), BF16)
    master = S((shape.n, shape.d), F32)
    state = Rows(master, master, master, master)
    scalars = RowScalars(S((), F32), S((), I32), S((), F32))
    totals = WeightGrads(master, master, S((shape.n,), F32))
    by_kernel = {"implementation": "mosaic_gpu"}
    update = {"copy_dtype": BF16, **by_kernel}
    pairs = (values, values, indices, a, a)
    of_pair, number = S((shape.tokens * shape.k,), F32), S((shape.tokens * shape.k,), I32)
    sorted_pairs = (Pairs(of_pair, number, number, S((), I32)), of_pair, a, a)

    def add_weight_grads(*args):
        return weight_grads(*args[:-1], shape.n, totals=args[-1], **by_kernel)

    def add_weight_grads_of_pairs(*args):
        return weight_grads_of_pairs(*args[:-1], shape.n, totals=args[-1], **by_kernel)

    return {
        "decode_loss": (functools.partial(decode_loss, **by_kernel), (values, indices, w, a)),
        "weight_grads": (functools.partial(weight_grads, n=shape.n, **by_kernel), pairs),
        "weight_grads with totals": (add_weight_grads, (*pairs, totals)),
        "weight_grads_of_pairs with totals": (add_weight_grads_of_pairs, (*sorted_pairs, totals)),
        "row_update": (
            functools.partial(row_update, settings=_DECODER, **update),
            (master, master, master, master, master, scalars),
        ),
        "weight_grads_update": (
            functools.partial(
                weight_grads_update, dec_settings=_DECODER, enc_settings=_ENCODER, **update
            ),
            (*pairs, state, state, scalars),
        ),
        "dense_sparse_matmul": (
            lambda *x: dense_sparse_matmul(*x, "mosaic_gpu"),
            (values, indices, w),
        ),
        "matmul_at_sparse_indices": (
            lambda *x: matmul_at_sparse_indices(*x, "mosaic_gpu"),
            (a, w, indices),
        ),
    }
