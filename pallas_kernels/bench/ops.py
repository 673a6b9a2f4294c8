"""The operations as cases to time: arguments, implementations, and the bytes that must move."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels as pk
from pallas_kernels.bench.inputs import Inputs
from pallas_kernels.bench.timing import Run
from pallas_kernels.shapes import Shape

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu", "reference")
_BLOCK_LIMIT = 2**30  # bytes of pre-activations that exist at once
_ROW_SETTINGS = pk.RowSettings(
    beta1=0.9, beta2=0.999, epsilon=6.25e-10, ema_decay=0.999, project=True, unit_norm=True
)
_PLAIN_ROW_SETTINGS = dataclasses.replace(_ROW_SETTINGS, project=False, unit_norm=False)


@dataclasses.dataclass(kw_only=True)
class Case:
    """One operation at one shape.

    Attributes:
      call: `(implementation, *arguments) -> arrays`.
      arguments: sets of arguments, which repetitions take in turn.
      moved: bytes that every implementation must read and write.
      others: what else does the same, by name; called with the arguments.
      donate: which arguments are updated in place.
      carry: the next arguments, from the last and what `call` returned; where some are donated.
      tokens: of the batch, where it had to be smaller than the shape's.
    """

    call: Callable[..., Any]
    arguments: list[tuple]
    moved: int
    others: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    donate: tuple[int, ...] = ()
    carry: Callable[[tuple, Any], tuple] | None = None
    tokens: int | None = None

    def reason_against(self, implementation: str) -> str | None:
        """Why this implementation cannot run here, or None."""
        try:
            jax.eval_shape(functools.partial(self.call, implementation), *self.arguments[0])
        except (NotImplementedError, ValueError) as error:
            return str(error)
        return None

    def run(self, implementation: str) -> Run:
        """To be timed; an implementation, or one of `others`."""
        function = self.others.get(implementation)
        if function is None:
            function = functools.partial(self.call, implementation)
        compiled = jax.jit(function, donate_argnums=self.donate)

        def call(i: int):
            i %= len(self.arguments)
            out = compiled(*self.arguments[i])
            if self.carry is not None:
                self.arguments[i] = self.carry(self.arguments[i], out)
            return out

        return Run(call)


def encoders(pool: Sequence[Inputs]) -> dict[str, Run]:
    """The denominators: `x @ w.T` by the backend's own library, in the operands' dtype.

    "encoder" is the plain call. "encoder in place" writes into memory that is there already: new
    memory has to be fetched from the operating system a page at a time, which on CPU can cost half
    as much again. Of the batch, as much is done at once as 1 GiB holds, over and over into the same
    memory.
    """
    tokens, (n, _), dtype = len(pool[0].x_BD), pool[0].w_LD.shape, pool[0].x_BD.dtype
    block = _tokens_within(_BLOCK_LIMIT, tokens, dtype.itemsize * n)

    def matmul(x_BD, w_LD, out_bL):
        if block == tokens:
            return x_BD @ w_LD.T

        def one(i, _):
            return lax.dynamic_slice_in_dim(x_BD, i * block, block) @ w_LD.T

        return lax.fori_loop(0, tokens // block, one, out_bL)

    fresh = jax.jit(lambda x_BD, w_LD: matmul(x_BD, w_LD, jnp.zeros((block, n), dtype)))
    reuse = jax.jit(matmul, donate_argnums=2, keep_unused=True)
    memory = [jnp.zeros((block, n), dtype)]

    def in_place(i: int):
        memory[0] = reuse(*_weights_and_tokens(pool, i), memory[0])
        return memory

    return {
        "encoder": Run(lambda i: fresh(*_weights_and_tokens(pool, i))),
        "encoder in place": Run(in_place),
    }


def _weights_and_tokens(pool: Sequence[Inputs], i: int) -> tuple[jax.Array, jax.Array]:
    return pool[i % len(pool)].x_BD, pool[i % len(pool)].w_LD


def copy(size: int) -> tuple[Run, int]:
    """A pass over `size` bytes, into memory that is there; and the bytes it reads and writes.

    The sign is flipped, so that it is a program of XLA's like the rest and not a `memcpy`.
    """
    turn = jax.jit(lambda a, old: -a, donate_argnums=1, keep_unused=True)
    arrays = [jnp.ones(size // 4), jnp.ones(size // 4)]

    def call(i: int):
        del i
        arrays[:] = [turn(*arrays), arrays[0]]
        return arrays

    return Run(call), 2 * size


def _tokens_within(limit: int, tokens: int, bytes_a_token: int) -> int:
    """The largest divisor of `tokens` whose rows fit, at least one."""
    most = max(limit // bytes_a_token, 1)
    return next(t for t in range(min(tokens, most), 0, -1) if tokens % t == 0)


def _activations(pool: Sequence[Inputs], tokens: int) -> list[tuple[jax.Array]]:
    """Pre-activations of the first tokens of each."""

    @jax.jit
    def of(x_BD, w_LD):
        return jnp.matmul(x_BD[:tokens], w_LD.T, preferred_element_type=jnp.float32)

    return [(of(p.x_BD, p.w_LD),) for p in pool[:4]]


def _top_k(shape: Shape, pool: Sequence[Inputs]) -> Case:
    tokens = _tokens_within(_BLOCK_LIMIT, shape.tokens, 4 * shape.n)
    return Case(
        call=lambda implementation, h_BL: pk.top_k(h_BL, shape.k, implementation=implementation),
        others={"lax.top_k": lambda h_BL: lax.top_k(h_BL, shape.k)},
        arguments=_activations(pool, tokens),
        moved=tokens * (4 * shape.n + 8 * shape.k),
        tokens=tokens,
    )


def _top_k_mask(shape: Shape, pool: Sequence[Inputs]) -> Case:
    """Of as many as AuxK keeps, whose dense code it makes."""
    tokens = _tokens_within(_BLOCK_LIMIT, shape.tokens, 4 * shape.n)
    return Case(
        call=lambda implementation, h_BL: pk.top_k_mask(
            h_BL, shape.k_aux, implementation=implementation
        ),
        others={"lax.top_k": lambda h_BL: lax.top_k(h_BL, shape.k_aux)},
        arguments=_activations(pool, tokens),
        moved=tokens * 5 * shape.n,
        tokens=tokens,
    )


def _topk_encode(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item = pool[0].x_BD.dtype.itemsize
    return Case(
        call=lambda implementation, x_BD, w_LD, b_L: pk.topk_encode(
            x_BD, w_LD, b_L, shape.k, implementation
        ),
        arguments=[(p.x_BD, p.w_LD, p.b_L) for p in pool],
        moved=item * shape.d * (shape.tokens + shape.n) + 8 * shape.tokens * shape.k,
    )


def _dense_sparse_matmul(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].w_LD.dtype.itemsize, shape.tokens * shape.k
    return Case(
        call=lambda implementation, values_BK, indices_BK, w_LD: pk.dense_sparse_matmul(
            values_BK, indices_BK, w_LD, implementation
        ),
        arguments=[(p.values_BK, p.indices_BK, p.w_LD) for p in pool],
        moved=pairs * (item * shape.d + 8) + 4 * shape.tokens * shape.d,
    )


def _matmul_at_sparse_indices(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].w_LD.dtype.itemsize, shape.tokens * shape.k
    return Case(
        call=lambda implementation, a_BD, w_LD, indices_BK: pk.matmul_at_sparse_indices(
            a_BD, w_LD, indices_BK, implementation
        ),
        arguments=[(p.e_BD, p.w_LD, p.indices_BK) for p in pool],
        moved=pairs * (item * shape.d + 8) + item * shape.tokens * shape.d,
    )


def _decode_loss(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].w_LD.dtype.itemsize, shape.tokens * shape.k
    return Case(
        call=lambda implementation, *arrays: pk.decode_loss(*arrays, implementation=implementation),
        arguments=[(p.values_BK, p.indices_BK, p.w_LD, p.x_BD) for p in pool],
        moved=pairs * (item * shape.d + 12) + shape.tokens * (2 * item * shape.d + 4),
    )


def _weight_grads(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].x_BD.dtype.itemsize, shape.tokens * shape.k
    return Case(
        call=lambda implementation, *arrays: pk.weight_grads(
            *arrays, shape.n, implementation=implementation
        ),
        arguments=[_pairs(p) for p in pool],
        moved=pairs * (2 * item * shape.d + 12) + 2 * 4 * shape.n * shape.d,
    )


def _pairs(p: Inputs) -> tuple[jax.Array, ...]:
    return p.values_BK, p.d_values_BK, p.indices_BK, p.e_BD, p.x_BD


def _sparse_transpose_matmul(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].e_BD.dtype.itemsize, shape.tokens * shape.k
    return Case(
        call=lambda implementation, *arrays: pk.sparse_transpose_matmul(
            *arrays, shape.n, implementation=implementation
        ),
        arguments=[(p.values_BK, p.indices_BK, p.e_BD) for p in pool],
        moved=pairs * (item * shape.d + 8) + 4 * shape.n * shape.d,
    )


def _kept(p: Inputs) -> jax.Array:
    """`[B, K]` bool: every other candidate; a shard of many keeps fewer than it offers."""
    rows_B, slots_K = (jnp.arange(size, dtype=jnp.int32) for size in p.indices_BK.shape)
    return (rows_B[:, None] + slots_K) % 2 == 0


def _lists(shape: Shape, pool: Sequence[Inputs]) -> list[pk.pair_list.Pairs]:
    of = jax.jit(lambda p: pk.pair_list.compact(_kept(p), p.values_BK, p.indices_BK, shape.n))
    return [of(p) for p in pool]


def _pair_list_compact(shape: Shape, pool: Sequence[Inputs]) -> Case:
    return Case(
        call=lambda implementation, *arrays: pk.pair_list.compact(
            *arrays, shape.n, implementation=implementation
        ),
        arguments=[(_kept(p), p.values_BK, p.indices_BK) for p in pool],
        moved=shape.tokens * shape.k * (9 + 12),
    )


def _pair_list_decode(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].w_LD.dtype.itemsize, shape.tokens * shape.k // 2
    return Case(
        call=lambda implementation, listed, w_LD: pk.pair_list.decode(
            listed, w_LD, shape.tokens, implementation=implementation
        ),
        arguments=[(listed, p.w_LD) for listed, p in zip(_lists(shape, pool), pool, strict=True)],
        moved=pairs * (item * shape.d + 12) + 4 * shape.tokens * shape.d,
    )


def _pair_list_dot(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].w_LD.dtype.itemsize, shape.tokens * shape.k // 2
    return Case(
        call=lambda implementation, *arrays: pk.pair_list.dot(
            *arrays, implementation=implementation
        ),
        arguments=[
            (listed, p.e_BD, p.w_LD) for listed, p in zip(_lists(shape, pool), pool, strict=True)
        ],
        moved=pairs * (item * shape.d + 12) + item * shape.tokens * shape.d,
    )


def _pair_list_add_outer(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].e_BD.dtype.itemsize, shape.tokens * shape.k // 2
    some = pool[:4]
    return Case(
        call=lambda implementation, *arrays: pk.pair_list.add_outer(
            *arrays, implementation=implementation
        ),
        arguments=[
            (jnp.zeros((shape.n, shape.d)), listed, p.e_BD)
            for listed, p in zip(_lists(shape, some), some, strict=True)
        ],
        moved=pairs * (item * shape.d + 12) + 2 * 4 * shape.n * shape.d,
        donate=(0,),
        carry=lambda old, new: (new, *old[1:]),
    )


def _weight_grads_of_pairs(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].x_BD.dtype.itemsize, shape.tokens * shape.k // 2
    return Case(
        call=lambda implementation, *arrays: pk.weight_grads_of_pairs(
            *arrays, shape.n, implementation=implementation
        ),
        arguments=[
            (listed, -listed.values_P, p.e_BD, p.x_BD)
            for listed, p in zip(_lists(shape, pool), pool, strict=True)
        ],
        moved=pairs * (2 * item * shape.d + 16) + 2 * 4 * shape.n * shape.d,
    )


def _rows(p: Inputs, seed: int) -> pk.Rows:
    """A matrix with moments and average as they are in the midst of training."""
    w_LD = jnp.array(p.w_LD, jnp.float32)  # a copy: it will be donated
    mu_LD = 1e-4 * jax.random.normal(jax.random.key(seed), w_LD.shape)
    return pk.Rows(w_LD, mu_LD, jnp.square(mu_LD) + 1e-10, w_LD + 0)


def _scalars() -> pk.RowScalars:
    return pk.RowScalars(jnp.float32(1e-4), jnp.int32(1000), jnp.float32(1.0))


def _row_update(shape: Shape, pool: Sequence[Inputs]) -> Case:
    copied = pool[0].w_LD.dtype if pool[0].w_LD.dtype != jnp.float32 else None

    def call(implementation, w_LD, g_LD, mu_LD, nu_LD, ema_LD, scalars):
        state = (w_LD, g_LD, mu_LD, nu_LD, ema_LD)
        settled = {"settings": _ROW_SETTINGS, "copy_dtype": copied}
        return pk.row_update(*state, scalars, **settled, implementation=implementation)

    def arguments(seed: int, p: Inputs) -> tuple:
        rows = _rows(p, seed)
        g_LD = 1e-4 * jax.random.normal(jax.random.key(seed + 1), rows.w_LD.shape)
        return rows.w_LD, g_LD, rows.mu_LD, rows.nu_LD, rows.ema_LD, _scalars()

    return Case(
        call=call,
        arguments=[arguments(seed, p) for seed, p in enumerate(pool[:4])],
        moved=shape.n * shape.d * (36 + (copied.itemsize if copied else 0)),
        donate=(0, 2, 3, 4),
        carry=lambda old, new: (new.w_LD, old[1], new.mu_LD, new.nu_LD, new.ema_LD, old[5]),
    )


def _weight_grads_update(shape: Shape, pool: Sequence[Inputs]) -> Case:
    item, pairs = pool[0].x_BD.dtype.itemsize, shape.tokens * shape.k
    copied = pool[0].w_LD.dtype if pool[0].w_LD.dtype != jnp.float32 else None
    a_parameter = 32 + (copied.itemsize if copied else 0)

    def call(implementation, *arguments):
        return pk.weight_grads_update(
            *arguments,
            dec_settings=_ROW_SETTINGS,
            enc_settings=_PLAIN_ROW_SETTINGS,
            copy_dtype=copied,
            implementation=implementation,
        )

    def carry(old, new):
        rows = (pk.Rows(r.w_LD, r.mu_LD, r.nu_LD, r.ema_LD) for r in (new.dec, new.enc))
        return *old[:5], *rows, old[7]

    return Case(
        call=call,
        arguments=[
            (*_pairs(p), _rows(p, 2 * seed), _rows(p, 2 * seed + 1), _scalars())
            for seed, p in enumerate(pool[:2])
        ],
        moved=pairs * (2 * item * shape.d + 12) + 2 * a_parameter * shape.n * shape.d,
        donate=(5, 6),
        carry=carry,
    )


CASES: dict[str, Callable[[Shape, Sequence[Inputs]], Case]] = {
    "top_k": _top_k,
    "top_k_mask": _top_k_mask,
    "topk_encode": _topk_encode,
    "dense_sparse_matmul": _dense_sparse_matmul,
    "matmul_at_sparse_indices": _matmul_at_sparse_indices,
    "sparse_transpose_matmul": _sparse_transpose_matmul,
    "decode_loss": _decode_loss,
    "weight_grads": _weight_grads,
    "row_update": _row_update,
    "weight_grads_update": _weight_grads_update,
    "pair_list.compact": _pair_list_compact,
    "pair_list.decode": _pair_list_decode,
    "pair_list.dot": _pair_list_dot,
    "pair_list.add_outer": _pair_list_add_outer,
    "weight_grads_of_pairs": _weight_grads_of_pairs,
}
