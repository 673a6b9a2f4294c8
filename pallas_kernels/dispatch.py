"""Choice of implementation, shared by every operation.

An operation lives in a folder of `pallas_kernels`, each implementation in a module named after it,
holding a function named after the operation. Modules of kernels also say what they cannot run:

    unsupported(target, *args, **kwargs) -> str | None

(`unsupported_NAME` for the operation `FOLDER.NAME`: a folder may hold several functions.)
They are imported when first needed, so that no device's toolchain is loaded without need.
"""

import contextlib
import contextvars
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KERNELS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}  # implementation -> its platform
_IMPLEMENTATIONS = (*KERNELS, "xla", "reference")
_PLATFORMS = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
_FIRST_JAX = {"mosaic_gpu": (0, 11), "mosaic_tpu": (0, 10, 2)}
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      device_kind: as JAX names the device, such as "NVIDIA H200" or "TPU v5p"; "" if unknown.
    """

    platform: str
    device_kind: str = ""


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)
_INTERPRET: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "interpret", default=None
)


_PREFERRED: contextvars.ContextVar[str | None] = contextvars.ContextVar("preferred", default=None)
_LISTENER: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar(
    "listener", default=None
)


def current_target() -> Target:
    """The target in force: that of `target`, else JAX's default device."""
    chosen = _TARGET.get()
    if chosen is not None:
        return chosen
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.devices(default)[0]
    return Target(default.platform, default.device_kind)


def platform_of(op: str, name: str | None) -> str:
    """ "cpu", "gpu" or "tpu", by any of their names; None is that of the target in force.

    Raises:
      ValueError: there is no such platform.
    """
    if name is None:
        return current_target().platform
    if name not in _PLATFORMS:
        raise ValueError(f"{op}: platform = {name!r} must be one of {list(_PLATFORMS)}")
    return _PLATFORMS[name]


@contextlib.contextmanager
def target(platform: str, device_kind: str = "") -> Iterator[None]:
    """What is traced inside is meant for another device: a mesh's, or one that is not here.

    A function that `jax.jit` has compiled before is not traced again, and keeps what it picked.

    Args:
      platform: "cpu", "gpu" (or "cuda", "rocm") or "tpu".
      device_kind: see `Target`.

    Raises:
      ValueError: there is no such platform.
    """
    token = _TARGET.set(Target(platform_of("target", platform), device_kind))
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def interpreting(**params: Any) -> Iterator[None]:
    """What is traced inside runs kernels in Pallas's interpreter, on CPU.

    Args:
      **params: of `pltpu.InterpretParams` or `plgpu.InterpretGPUParams`, such as detect_races.
    """
    token = _INTERPRET.set(params)
    try:
        yield
    finally:
        _INTERPRET.reset(token)


@contextlib.contextmanager
def preferring(implementation: str | None) -> Iterator[None]:
    """Operations traced inside that have this implementation use it, or raise; None is no wish.

    Those for which a call names an implementation are not affected.

    Raises:
      ValueError: no operation has such an implementation.
    """
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"preferring: implementation = {implementation!r} must be one of "
            f"{list(_IMPLEMENTATIONS)} or None (no wish)"
        )
    token = _PREFERRED.set(implementation)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


@contextlib.contextmanager
def listening(listener: Callable[[str], Any]) -> Iterator[None]:
    """`listener` is told, in a line, of every implementation and layout picked while tracing."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(line: str):
    """Passes a line on to the listener, if there is one."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(line)


def interpret_params(implementation: str) -> Any:
    """What a kernel passes on as `interpret`: the interpreter's parameters, or that it is off."""
    params = _INTERPRET.get()
    if implementation == "mosaic_tpu":
        module = importlib.import_module("jax.experimental.pallas.tpu")
        return False if params is None else module.InterpretParams(**params)
    module = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    return None if params is None else module.InterpretGPUParams(**params)


def why_not(op: str, implementation: str, *args: Any, **kwargs: Any) -> str | None:
    """Why `implementation` cannot run a call of `op` here; None if it can.

    Args:
      op: name of the operation's folder; a dot leads to a function within it.
      implementation: one that exists for this operation.
      *args, **kwargs: of the call; shapes and dtypes suffice.
    """
    platform = KERNELS.get(implementation)
    if platform is None:
        return None
    where = current_target()
    if jax.__version_info__ < _FIRST_JAX[implementation]:
        need = ".".join(map(str, _FIRST_JAX[implementation]))
        return f"it needs jax >= {need}, and this is {jax.__version__}"
    if _INTERPRET.get() is None:
        if where.platform != platform:
            return f"it runs on {platform} devices, and the target is {where.platform}"
        if platform == "gpu" and not any(name in where.device_kind for name in _HOPPER):
            return f"it needs a Hopper GPU (H100, H200), and the target is {where.device_kind!r}"
    module, name = _module(op, implementation)
    check = f"unsupported_{name}" if "." in op else "unsupported"
    return getattr(module, check)(where, *args, **kwargs)


def call(op: str, implementation: str | None, available: tuple[str, ...], *args, **kwargs) -> Any:
    """Carries out `op` by the named implementation, or by the first one that can run.

    Args:
      op: see `why_not`.
      implementation: one of `available`, or None.
      available: the operation's implementations, preferred first; "reference" is never picked.
      *args, **kwargs: of the call.

    Raises:
      ValueError: the named implementation does not exist for this operation.
      NotImplementedError: the named implementation cannot run this call.
    """
    args, kwargs = jax.tree.map(_as_jax, (args, kwargs))
    name = choose(op, implementation, available, *args, **kwargs)
    if _LISTENER.get() is not None:
        others = {other: why_not(op, other, *args, **kwargs) for other in available}
        reasons = [f"{other}: {reason}" for other, reason in others.items() if reason]
        tell(f"{op}: {name}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return _function(op, name)(*args, **kwargs)


def choose(op: str, implementation: str | None, available: tuple[str, ...], *args, **kwargs) -> str:
    """The implementation that `call` would use; see there."""
    if implementation is None and _PREFERRED.get() in available:
        implementation = _PREFERRED.get()
    if implementation is None:
        able = (name for name in available if why_not(op, name, *args, **kwargs) is None)
        return next(name for name in able if name != "reference")
    if implementation not in available:
        raise ValueError(
            f"{op}: implementation = {implementation!r} does not exist; "
            f"choose one of {sorted(available)} or None (picks for you)"
        )
    reason = why_not(op, implementation, *args, **kwargs)
    if reason is not None:
        raise NotImplementedError(
            f"{op}: implementation = {implementation!r} cannot run: {reason}; "
            f"None picks one that can"
        )
    return implementation


def _as_jax(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _module(op: str, implementation: str) -> tuple[Any, str]:
    folder, _, name = op.partition(".")
    return importlib.import_module(f"pallas_kernels.{folder}.{implementation}"), name or folder


def _function(op: str, implementation: str) -> Callable:
    module, name = _module(op, implementation)
    return getattr(module, name)
