"""The optimizer's work on Hopper GPUs: every row is read once, and written once, in place.

A block of one warpgroup owns a few rows, with the gradient's row in float32 registers. Per entry of
a float32 matrix 20 bytes are read and 16 written, and 2 for a bfloat16 copy. Wide rows are read
when they are needed, a projected one a second time, from the cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import gpu_rows

WIDEST = 12288  # entries of a row: 96 registers of gradient to a thread, of 255
_ROWS_PER_BLOCK = 4
_CHUNKS_TOGETHER = 4  # read before the first of them is written
_EARLY = 1024  # rows up to here are read while their gradient is being summed up
_HELD = 8192  # new rows up to here stay in registers until their norm is known


class State(NamedTuple):
    """A matrix and what is updated with it: arrays, or inside a kernel references to them.

    Attributes:
      w_LD, mu_LD, nu_LD, ema_LD: float32, see `row_update`.
    """

    w_LD: Any
    mu_LD: Any
    nu_LD: Any
    ema_LD: Any


def unsupported(
    target, w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars, *, settings, copy_dtype=None
) -> str | None:
    """See `pallas_kernels.dispatch`."""
    del target, scalars, settings
    return gpu_rows.unsupported(g_LD=g_LD) or unsupported_state(
        State(w_LD, mu_LD, nu_LD, ema_LD), copy_dtype
    )


def unsupported_state(state, copy_dtype) -> str | None:
    """Why a kernel cannot update this matrix; None if it can."""
    if any(array is not None and array.dtype != jnp.float32 for array in state):
        return "it updates float32 matrices only"
    if copy_dtype is not None and jnp.dtype(copy_dtype).name not in ("float32", "bfloat16"):
        return f"it makes copies in float32 and bfloat16 only, not {jnp.dtype(copy_dtype).name}"
    width = state[0].shape[1]
    if width > WIDEST:
        return f"w_LD has rows of {width}, and it takes at most {WIDEST}"
    return gpu_rows.unsupported(w_LD=state[0])


def row_update(w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars, *, settings, copy_dtype=None):
    """See `pallas_kernels.row_update.api.row_update`."""
    width = w_LD.shape[1]

    def gradient(g_LD, row):
        return tuple(g.astype(jnp.float32) for g in gpu_rows.load(g_LD, row, 0, width))

    state = State(w_LD, mu_LD, nu_LD, ema_LD)
    done, () = update_rows(gradient, g_LD, state, scalars, settings, copy_dtype)
    return done


def update_rows(gradient, given, state: State, scalars, settings, copy_dtype, extra=()):
    """Updates all rows in place, each with a gradient made in the kernel.

    Args:
      gradient: `gradient(given, row)` is row number `row` of the gradient, float32; called inside
        the kernel. With `extra`, it is called `gradient(given, row, *extra results)`.
      given: pytree of arrays, references to which `gradient` gets.
      state: arrays; overwritten where the caller gives them up.
      scalars, settings, copy_dtype: see `row_update`.
      extra: types of results that `gradient` writes.

    Returns:
      What `row_update` returns, and the extra results.
    """
    n, width = state.w_LD.shape
    if 0 in (n, width):
        copy_LD = None if copy_dtype is None else state.w_LD.astype(copy_dtype)
        blank = tuple(jnp.zeros(kind.shape, kind.dtype) for kind in extra)
        return (*state, copy_LD, jnp.zeros(n, jnp.float32)), blank
    kinds = [jax.ShapeDtypeStruct((n,), jnp.float32), *extra]
    if copy_dtype is not None:
        kinds.append(jax.ShapeDtypeStruct((n, width), copy_dtype))

    def update(given, state, factors, squared_norm_L, *rest):
        copy_LD = None if copy_dtype is None else rest[-1]
        rates = Rates(*(factors[i] for i in range(len(Rates._fields))))

        def one(row):
            old = Old(state, row, width)
            g = gradient(given, row, *rest[: len(extra)])
            squared_norm_L[row] = update_row(g, old, state, copy_LD, row, rates, settings)

        gpu_rows.for_rows_of_block(one, n, lax.axis_index("block"), _ROWS_PER_BLOCK)

    in_place = jax.tree.map(jax.new_ref, state)
    run = gpu_rows.kernel(update, kinds, -(-n // _ROWS_PER_BLOCK))
    squared_norm_L, *rest = run(given, in_place, _factors(scalars, settings))
    copy_LD = None if copy_dtype is None else rest.pop()
    updated = jax.tree.map(jax.freeze, in_place)
    return (*updated, copy_LD, squared_norm_L), tuple(rest)


class Rates(NamedTuple):
    """float32 scalars: the learning rate, the gradient's scale, the moments' corrections, and
    whether to update at all (1) or to leave everything as it is (0)."""

    learning_rate: Any
    scale: Any
    correct_mu: Any
    correct_nu: Any
    accept: Any


def _factors(scalars, settings) -> jax.Array:
    step = scalars.step.astype(jnp.float32)
    corrections = (1 / (1 - beta**step) for beta in (settings.beta1, settings.beta2))
    accept = True if scalars.accept is None else scalars.accept
    rates = Rates(scalars.learning_rate, scalars.scale, *corrections, accept)
    return jnp.stack([jnp.asarray(rate, jnp.float32) for rate in rates])


class Old:
    """The state of one row before its update, inside a kernel."""

    def __init__(self, state: State, row, width: int):
        self._state, self._row = state, row
        self._early = None
        if width <= _EARLY:
            self._early = jax.tree.map(lambda ref: gpu_rows.load(ref, row, 0, width), state)

    def chunk(self, name: str, i: int, span: tuple[int, int]) -> jax.Array:
        """Chunk number i, which covers `span`, of the array called `name`."""
        if self._early is not None:
            return getattr(self._early, name)[i]
        return gpu_rows.load_chunk(getattr(self._state, name), self._row, *span)


def update_row(
    g: gpu_rows.Row, old: Old, state: State, copy_LD, row, rates: Rates, settings
) -> jax.Array:
    """One row of `row_update`, inside a kernel.

    Args:
      g: the row's gradient, float32.
      old: the row's state.
      state: references, for the new state.
      copy_LD: reference, or None.
      row: int32, which row.
      rates: see `Rates`.
      settings: `RowSettings`.

    Returns:
      The squared norm of the gradient.
    """
    spans = list(enumerate(gpu_rows.chunks(sum(chunk.size for chunk in g))))
    if settings.project:
        g = _project(g, old, spans)
    squared_norm = gpu_rows.total(chunk * chunk for chunk in g)

    # The state is updated in place: what is not written stays.
    @pl.when(rates.accept > 0)
    def _accepted():
        _write(g, old, state, copy_LD, row, rates, settings, spans)

    if copy_LD is not None:

        @pl.when(rates.accept == 0)
        def _skipped():
            for _, (start, size) in spans:
                chunk = gpu_rows.load_chunk(state.w_LD, row, start, size)
                gpu_rows.store(copy_LD, row, start, (chunk,))

    return squared_norm


def _write(g, old: Old, state: State, copy_LD, row, rates: Rates, settings, spans) -> None:
    """The new state of one row whose gradient, projected, is g."""
    held = sum(chunk.size for chunk in g) <= _HELD
    w = _moved(g, old, state, row, rates, settings, spans)
    w = list(w) if held else w
    if settings.unit_norm:
        norm = jnp.sqrt(gpu_rows.total(chunk * chunk for chunk in _stored(w, state, row, held)))
        inverse = 1 / jnp.where(norm > 0, norm, 1.0)
        w = w if held else (gpu_rows.load_chunk(state.w_LD, row, *span) for _, span in spans)
        w = (inverse * chunk for chunk in w)
    w = iter(w)
    together = len(spans) if held else _CHUNKS_TOGETHER
    for at in range(0, len(spans), together):
        some = [span for _, span in spans[at : at + together]]
        new = tuple(next(w) for _ in some)
        if state.ema_LD is not None:
            before = [old.chunk("ema_LD", at + i, span) for i, span in enumerate(some)]
            decay = settings.ema_decay
            averages = (decay * a + (1 - decay) * chunk for a, chunk in zip(before, new))
            gpu_rows.store(state.ema_LD, row, some[0][0], tuple(averages))
        for ref in (state.w_LD, copy_LD):
            if ref is not None:
                gpu_rows.store(ref, row, some[0][0], new)


def _moved(g, old: Old, state: State, row, rates: Rates, settings, spans):
    """Yields the row after Adam's step, chunk by chunk, and writes its moments."""
    for at in range(0, len(g), _CHUNKS_TOGETHER):
        some = spans[at : at + _CHUNKS_TOGETHER]
        # All reads first: a write holds up the reads behind it.
        before = [[old.chunk(name, *span) for name in ("w_LD", "mu_LD", "nu_LD")] for span in some]
        for (i, (start, _)), (w_old, mu, nu) in zip(some, before, strict=True):
            scaled = rates.scale * g[i]
            mu = settings.beta1 * mu + (1 - settings.beta1) * scaled
            nu = settings.beta2 * nu + (1 - settings.beta2) * (scaled * scaled)
            gpu_rows.store(state.mu_LD, row, start, (mu,))
            gpu_rows.store(state.nu_LD, row, start, (nu,))
            spread = jnp.sqrt(rates.correct_nu * nu) + settings.epsilon
            yield w_old - (rates.learning_rate * rates.correct_mu) * mu / spread


def _stored(w, state: State, row, held: bool):
    """The same chunks; written first where registers do not hold them until they are needed."""
    start = 0
    for chunk in w:
        if not held:
            gpu_rows.store(state.w_LD, row, start, (chunk,))
        start += chunk.size
        yield chunk


def _project(g, old: Old, spans) -> gpu_rows.Row:
    """Removes the component of a row's gradient along the row; a zero row has none."""
    rows = (old.chunk("w_LD", *span) for span in spans)
    along, squared = gpu_rows.totals((chunk * w, w * w) for chunk, w in zip(g, rows))
    along = along / jnp.where(squared > 0, squared, 1.0)
    rows = (old.chunk("w_LD", *span) for span in spans)
    return tuple(chunk - along * w for chunk, w in zip(g, rows, strict=True))
