"""The update on TPUs: blocks of whole rows, read once and written once, in place."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tpu
from pallas_kernels.dispatch import Target

_BLOCK_BYTES = 24 * 2**20  # of all matrices' blocks, being used and under way
_MOST_ROWS = 512
_ROWS = 16  # of a block that are updated at a time: the tile of the copy, if it is bfloat16


def unsupported(
    target: Target, w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars, *, settings, copy_dtype=None
):
    """Why the call cannot run; None if it can. See `pallas_kernels.dispatch`."""
    matrices = {"w_LD": w_LD, "g_LD": g_LD, "mu_LD": mu_LD, "nu_LD": nu_LD, "ema_LD": ema_LD}
    given = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    refusal = tpu.refusal(target, **given)
    if refusal is not None:
        return refusal
    for name, matrix in given.items():
        if matrix.dtype != jnp.float32 and name != "g_LD":
            return f"{name} is {matrix.dtype}, and the state is kept in float32"
    if copy_dtype not in (None, jnp.float32, jnp.bfloat16):
        return f"copy_dtype is {jnp.dtype(copy_dtype)}; the kernel writes 32 or 16 bits"
    if _rows(w_LD, ema_LD) < _ROWS:
        return f"d = {w_LD.shape[1]}, and blocks of {_ROWS} rows do not fit the vector memory"
    return None


def row_update(w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars, *, settings, copy_dtype=None):
    """See `pallas_kernels.row_update.api.row_update`."""
    n, width = w_LD.shape
    rows = _rows(w_LD, ema_LD)
    step = scalars.step.astype(jnp.float32)
    numbers = jnp.stack(
        [
            jnp.asarray(scalars.learning_rate, jnp.float32),
            jnp.asarray(scalars.scale, jnp.float32),
            1 - settings.beta1**step,
            1 - settings.beta2**step,
            jnp.asarray(True if scalars.accept is None else scalars.accept, jnp.float32),
        ]
    )
    state = [w_LD, mu_LD, nu_LD, *([] if ema_LD is None else [ema_LD])]
    block = pl.BlockSpec((rows, width), lambda i: (i, 0))
    copies = [] if copy_dtype is None else [jax.ShapeDtypeStruct((n, width), copy_dtype)]
    blocks = pl.cdiv(n, rows)
    *updated, norms = pl.pallas_call(
        functools.partial(_kernel, settings, ema_LD is not None, copy_dtype is not None),
        grid=(blocks,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block] + [block] * len(state),
        out_specs=[
            *([block] * (len(state) + len(copies))),
            pl.BlockSpec((1, 1, rows), lambda i: (i, 0, 0)),
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct((n, width), jnp.float32) for _ in state),
            *copies,
            jax.ShapeDtypeStruct((blocks, 1, rows), jnp.float32),
        ],
        input_output_aliases={2 + i: i for i in range(len(state))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tpu.VMEM_LIMIT
        ),
        interpret=dispatch.interpret_params("mosaic_tpu"),
        name="row_update",
    )(numbers, g_LD, *state)
    w_LD, mu_LD, nu_LD, *others = updated
    ema_LD = others.pop(0) if ema_LD is not None else None
    copy_LD = others.pop(0) if copies else None
    return w_LD, mu_LD, nu_LD, ema_LD, copy_LD, norms.reshape(-1)[:n]


def _rows(w_LD, ema_LD) -> int:
    """Of a block: a multiple of `_ROWS`; 0 if not one fits."""
    n, width = w_LD.shape
    matrices = 8 if ema_LD is None else 10
    most = min(_BLOCK_BYTES // (matrices * 2 * 4 * width), _MOST_ROWS)
    return min(most // _ROWS * _ROWS, tpu.round_up(n, _ROWS))


def _kernel(settings, has_ema: bool, has_copy: bool, numbers, g_RD, *refs):
    refs = list(refs)
    state = [refs.pop(0) for _ in range(3 + has_ema)]
    out = [refs.pop(0) for _ in range(3 + has_ema)]
    copy_RD = refs.pop(0) if has_copy else None
    (norms_11R,) = refs
    place_11R = lax.broadcasted_iota(jnp.int32, norms_11R.shape, 2)

    @pl.loop(0, g_RD.shape[0] // _ROWS)
    def _some_rows(i):
        first = pl.multiple_of(i * _ROWS, _ROWS)
        some = pl.ds(first, _ROWS)
        values = [ref[some] for ref in state]
        updated, norm_r1 = _update(settings, numbers, g_RD[some].astype(jnp.float32), *values)
        accept = numbers[4] > 0
        updated = [jnp.where(accept, new, old) for new, old in zip(updated, values, strict=True)]
        for ref, value in zip(out, updated):
            ref[some] = value
        if has_copy:
            copy_RD[some] = updated[0].astype(copy_RD.dtype)
        # Norms are one to a row, and written one to a lane.
        lane_r1 = lax.broadcasted_iota(jnp.int32, norm_r1.shape, 0) + first
        is_place_rR = lane_r1 == place_11R[0]
        norm_1R = jnp.where(is_place_rR, norm_r1, 0.0).sum(0, keepdims=True)
        is_here_11R = (place_11R >= first) & (place_11R < first + _ROWS)
        norms_11R[...] = jnp.where(is_here_11R, norm_1R[None], norms_11R[...])


def _update(settings, numbers, g, w, mu, nu, ema=None):
    """New state of some rows, and the squared norms of their gradients `[rows, 1]`."""
    learning_rate, scale, unbias1, unbias2 = (numbers[i] for i in range(4))
    if settings.project:
        unit = _unit_rows(w)
        g = g - (g * unit).sum(-1, keepdims=True) * unit
    squared_norm = (g * g).sum(-1, keepdims=True)
    g = g * scale
    mu = settings.beta1 * mu + (1 - settings.beta1) * g
    nu = settings.beta2 * nu + (1 - settings.beta2) * (g * g)
    w = w - learning_rate * (mu / unbias1) / (jnp.sqrt(nu / unbias2) + settings.epsilon)
    if settings.unit_norm:
        w = _unit_rows(w)
    averages = () if ema is None else (settings.ema_decay * ema + (1 - settings.ema_decay) * w,)
    return (w, mu, nu, *averages), squared_norm


def _unit_rows(w):
    norm = jnp.sqrt((w * w).sum(-1, keepdims=True))
    return w / jnp.where(norm > 0, norm, 1.0)
