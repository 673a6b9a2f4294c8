"""Checks of arguments, the same in every operation; errors name the argument and the limit."""

from typing import Any

import jax.numpy as jnp

FLOATS = ("bfloat16", "float32", "float64")
_INDEX_LIMIT = 2**31


def array(op: str, name: str, value: Any, shape: tuple[int | None, ...], kind: str = "float"):
    """Checks the rank, the known sizes and the kind of one array.

    Args:
      op, name: of the operation and the argument, for the error.
      value: anything with a shape and a dtype.
      shape: expected sizes; None is any.
      kind: "float", or "int32".

    Raises:
      ValueError: the shape differs, or an entry could not be addressed by 32-bit arithmetic.
      TypeError: the dtype is none of those supported.
    """
    wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
    same = len(value.shape) == len(shape) and all(
        want in (None, size) for size, want in zip(value.shape, shape, strict=True)
    )
    if not same:
        raise ValueError(f"{op}: {name} has shape {list(value.shape)}, but must have {wanted}")
    allowed = FLOATS if kind == "float" else (kind,)
    if jnp.dtype(value.dtype).name not in allowed:
        raise TypeError(
            f"{op}: {name} has dtype {jnp.dtype(value.dtype).name}, but must be one of "
            f"{', '.join(allowed)}; convert it with {name}.astype(...)"
        )
    count = 1
    for size in value.shape:
        count *= size
    if count >= _INDEX_LIMIT:
        raise ValueError(
            f"{op}: {name} of shape {list(value.shape)} has {count} entries on one device; flat "
            f"indices are 32-bit, so that it must have fewer than 2**31: use more latent shards, "
            f"or fewer tokens at a time"
        )


def kept(op: str, name: str, k: int, n_latents: int):
    """Checks the number of entries kept of every row.

    Raises:
      ValueError: it is no whole number in [1, n_latents].
    """
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n_latents:
        raise ValueError(
            f"{op}: {name} = {k!r} must be a whole number in [1, {n_latents}], the row length"
        )


def optional(op: str, name: str, value: Any, shape: tuple[int | None, ...]):
    """`array`, where None is allowed."""
    if value is not None:
        array(op, name, value, shape)
