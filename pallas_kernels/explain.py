"""What the dispatcher picks, and why not the others."""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import dispatch


def explain(op: Callable, *args: Any, **kwargs: Any) -> str:
    """What each operation inside a call picks: one line each, with the reasons against the others.

    Args:
      op: an operation of this package, or any function that calls some.
      *args, **kwargs: of the call; `jax.ShapeDtypeStruct` instead of arrays will do.

    Returns:
      Lines like "topk_encode: xla (mosaic_gpu: it runs on gpu devices, and the target is cpu)", in
      the order of the calls, without repetitions.

    Raises:
      ValueError: no operation was traced: the function calls none, or is jitted and was compiled
        before, so that it keeps what it picked then.
    """
    lines: dict[str, None] = {}
    with dispatch.listening(lambda line: lines.setdefault(line)):
        arrays, static = _split((args, kwargs))
        jax.eval_shape(lambda *arrays: _call(op, static, arrays), *arrays)
    if not lines:
        raise ValueError(
            f"explain: {getattr(op, '__name__', op)!r} traced no operation; give the function that "
            f"`jax.jit` was made from, and one that calls an operation of pallas_kernels"
        )
    return "\n".join(lines)


def _split(tree: Any) -> tuple[list, Any]:
    leaves, structure = jax.tree.flatten(tree)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]
    arrays = [leaf for leaf, yes in zip(leaves, is_array, strict=True) if yes]
    return arrays, (structure, leaves, is_array)


def _call(op: Callable, static: Any, arrays: tuple) -> Any:
    structure, leaves, is_array = static
    given = iter(arrays)
    leaves = [next(given) if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True)]
    args, kwargs = jax.tree.unflatten(structure, leaves)
    return op(*args, **kwargs)
