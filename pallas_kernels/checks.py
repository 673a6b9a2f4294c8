"""Checks of arguments, the same in every operation; errors name the argument and the limit."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

FLOATS = ("bfloat16", "float32", "float64")
_WIDE = FLOATS[1:]  # what sums and optimizers keep
_INDEX_LIMIT = 2**31


def array(op: str, name: str, value: Any, shape: tuple[int | None, ...], kind: str = "float"):
    """Checks the rank, the known sizes and the kind of one array.

    Args:
      op, name: of the operation and the argument, for the error.
      value: anything with a shape and a dtype.
      shape: expected sizes; None is any.
      kind: "float", "wide" (float32 or float64), "int32" or "bool".

    Raises:
      ValueError: the shape differs, or an entry could not be addressed by 32-bit arithmetic.
      TypeError: it is no array, or its dtype is none of those supported.
    """
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}, but must be an array")
    wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
    same = len(value.shape) == len(shape) and all(
        want in (None, size) for size, want in zip(value.shape, shape, strict=True)
    )
    if not same:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, but must have {wanted}")
    allowed = {"float": FLOATS, "wide": _WIDE}.get(kind, (kind,))
    if jnp.dtype(value.dtype).name not in allowed:
        raise TypeError(
            f"{op}: {name} has dtype {jnp.dtype(value.dtype).name}, but must be one of "
            f"{', '.join(allowed)}; convert it with {name}.astype(...)"
        )
    entries(op, f"{name} of shape {list(value.shape)}", math.prod(value.shape))


def instance(op: str, name: str, value: Any, kind: type):
    """Raises TypeError unless an argument of several fields is of its class, whose names it has."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{op}: {name} is a {type(value).__name__}, but must be a {kind.__name__} of "
            "pallas_kernels"
        )


def entries(op: str, what: str, count: int):
    """Raises ValueError if so many entries cannot be addressed by 32-bit arithmetic."""
    if count >= _INDEX_LIMIT:
        raise ValueError(
            f"{op}: {what} has {count} entries on one device; flat indices are 32-bit, so that it "
            f"must have fewer than 2**31: use more latent shards, or fewer tokens at a time"
        )


def code(op: str, values: Any, indices: Any, names: tuple[str, str]):
    """Checks values `[B, K]` and int32 indices of the same shape, K >= 1."""
    array(op, names[0], values, (None, None))
    array(op, names[1], indices, values.shape, "int32")
    if values.shape[1] < 1:
        raise ValueError(
            f"{op}: {names[0]} has shape {list(values.shape)}, but must keep at least one per row"
        )


def pairs(op: str, pairs: Any):
    """Checks the arrays of a list of pairs: as long as each other, tokens and latents int32.

    Raises:
      ValueError, TypeError: they are not, or it is no such list.
    """
    if not hasattr(pairs, "latents_P"):
        raise TypeError(
            f"{op}: pairs is a {type(pairs).__name__}, but must be a Pairs of "
            "pallas_kernels.pair_list, which compact makes"
        )
    array(op, "pairs.values_P", pairs.values_P, (None,))
    for name in ("tokens_P", "latents_P"):
        array(op, f"pairs.{name}", getattr(pairs, name), pairs.values_P.shape, "int32")
    array(op, "pairs.count", pairs.count, (), "int32")


def whole(op: str, name: str, value: int, least: int = 1):
    """Checks a number of latents or tokens.

    Raises:
      ValueError: it is no whole number of at least `least`, or none of 32 bits.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{op}: {name} = {value!r} must be a whole number of at least {least}")
    entries(op, f"a column of {name} = {value}", int(value))


def result(op: str, n_rows: int, width: int):
    """Raises ValueError if a result `[n_rows, width]` cannot be addressed by 32-bit arithmetic."""
    entries(op, f"the result of shape {[int(n_rows), width]}", int(n_rows) * width)


def kept(op: str, name: str, k: int, n_latents: int):
    """Checks the number of entries kept of every row.

    Raises:
      ValueError: it is no whole number in [1, n_latents].
    """
    whole = isinstance(k, (int, np.integer)) and not isinstance(k, bool)
    if not whole or not 1 <= k <= n_latents:
        raise ValueError(
            f"{op}: {name} = {k!r} must be a whole number in [1, {n_latents}], the row length"
        )


def optional(op: str, name: str, value: Any, shape: tuple[int | None, ...]):
    """`array`, where None is allowed."""
    if value is not None:
        array(op, name, value, shape)


def state(op: str, arrays: dict[str, Any], like: Any):
    """Checks what an optimizer keeps, by name: as large as `like` and of its dtype.

    Only an average, whose name ends in "ema_LD", may be None.

    Raises:
      ValueError, TypeError: see `array`; a dtype is neither float32 nor float64, or not `like`'s.
    """
    for name, value in arrays.items():
        if value is None and name.endswith("ema_LD"):
            continue
        array(op, name, value, like.shape, "wide")
        if value.dtype != like.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {jnp.dtype(value.dtype).name}, but weights and optimizer "
                f"state must be of one dtype, and the first is {jnp.dtype(like.dtype).name}"
            )


def dtype(op: str, name: str, value: Any) -> jnp.dtype:
    """The dtype that an option asks for.

    Raises:
      TypeError: it is none, or none of those supported.
    """
    try:
        found = jnp.dtype(value).name
    except TypeError:
        found = repr(value)
    if found not in FLOATS:
        raise TypeError(f"{op}: {name} is {found}, but must be one of {', '.join(FLOATS)}")
    return jnp.dtype(found)
