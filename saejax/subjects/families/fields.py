"""Reading fields of config.json: each with its type, and everything not implemented refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saejax.subjects.decoder import ACTIVATIONS

Raw = Mapping[str, Any]
_LAYER_TYPES = ("full_attention", "sliding_attention")


def whole(raw: Raw, name: str, default: int | None = None) -> int:
    """A positive whole number.

    Raises:
      ValueError: it is missing (and has no default) or something else.
    """
    value = raw.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {name} = {value!r}, a positive whole number is needed")
    return value


def require(raw: Raw, *names: str) -> None:
    """Refuses a config without these whole numbers, naming all that are missing."""
    missing = [n for n in names if type(raw.get(n)) is not int]
    if missing:
        raise ValueError(f"config.json: whole numbers are needed for {', '.join(missing)}")


def number(raw: Raw, name: str, default: float | None) -> float | None:
    """A positive number; an explicit null is None."""
    value = raw.get(name, default)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError(f"config.json: {name} = {value!r}, a positive number is needed")
    return float(value)


def positive(raw: Raw, name: str, default: float) -> float:
    """A positive number; an explicit null, with which no model could be built, is refused."""
    value = number(raw, name, default)
    if value is None:
        raise ValueError(
            f"config.json: {name} = null, a positive number is needed; without the field it is "
            f"{default}"
        )
    return value


def flag(raw: Raw, name: str, default: bool) -> bool:
    """True or false."""
    value = raw.get(name)
    value = default if value is None else value
    if type(value) is not bool:
        raise ValueError(f"config.json: {name} = {value!r}, true or false is needed")
    return value


def table(raw: Raw, name: str) -> Raw:
    """An object of fields; empty where it is missing or null."""
    value = raw.get(name)
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json: {name} = {value!r}, an object of fields is needed")
    return value


def activation(raw: Raw, name: str, default: str) -> str:
    """An activation function that is implemented; no model could be built of an explicit null."""
    value = raw.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {name} = {value!r} is not supported; allowed: {', '.join(ACTIVATIONS)}"
        )
    return value


def refuse_unless(raw: Raw, allowed: Mapping[str, Any]) -> None:
    """Refuses fields whose value, where given, is not the one that is implemented."""
    for name, value in allowed.items():
        if raw.get(name) not in (None, value):
            raise ValueError(
                f"config.json: {name} = {raw[name]} is not supported; allowed: {value}"
            )


def layer_types(raw: Raw, n_layers: int, default: list[str]) -> list[str]:
    """'full_attention' or 'sliding_attention' for each layer."""
    kinds = raw.get("layer_types") or default
    if not isinstance(kinds, list):
        raise ValueError(f"config.json: layer_types = {kinds!r}, a list is needed")
    unknown = sorted({repr(kind) for kind in kinds if kind not in _LAYER_TYPES})
    if unknown or len(kinds) != n_layers:
        raise ValueError(
            f"config.json: layer_types must hold one of {', '.join(_LAYER_TYPES)} for each of the "
            f"{n_layers} layers, but has {len(kinds)} entries"
            + (f" and {', '.join(unknown)}" if unknown else "")
        )
    return list(kinds)


def windows(kinds: list[str], window: Any) -> tuple[int | None, ...]:
    """The window of each layer; empty if every layer sees everything. `window` as in the file."""
    if "sliding_attention" not in kinds:
        return ()
    if window is None:
        raise ValueError("config.json: sliding_window is missing, but layer_types has sliding ones")
    window = whole({"sliding_window": window}, "sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
