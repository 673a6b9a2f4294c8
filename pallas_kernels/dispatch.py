"""Choice of implementation, shared by every operation."""

from collections.abc import Callable, Mapping


def choose(op: str, implementation: str | None, available: Mapping[str, Callable]) -> Callable:
    """Returns the function that carries out `op`.

    Args:
      op: name of the operation, for the error.
      implementation: a key of `available`, or None for the fast default ("xla").
      available: implementation name -> function.

    Raises:
      ValueError: the named implementation does not exist for this operation.
    """
    name = "xla" if implementation is None else implementation
    if name not in available:
        raise ValueError(
            f"{op}: implementation = {implementation!r} does not exist; "
            f"choose one of {sorted(available)} or None (picks for you)"
        )
    return available[name]
