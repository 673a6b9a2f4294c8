"""What a configuration may hold: field types, near names, and the text and JSON of built objects.

Knows nothing of gin's machinery: `config.py` reads the files, this file judges single values and
writes built objects down again.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

Names = Mapping[type, str]  # dataclass -> the name it has in gin files


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/Name()` in a gin file; `call` is False where the parentheses are missing."""

    name: str
    scope: str = ""
    call: bool = True
    target: type | None = None

    @property
    def path(self) -> str:
        """`scope/Name`, as on the left of a binding."""
        return f"{self.scope}/{self.name}" if self.scope else self.name

    def __str__(self) -> str:
        return f"@{self.path}{'()' if self.call else ''}"


class Mismatch(Exception):
    """A value that does not fit its annotation; the message is the fix, and may be empty."""


def nearest(word: str, candidates: Iterable[str], shown: Mapping[str, str] | None = None) -> str:
    """` Did you mean ...?` for the closest candidates, or an empty string.

    The comparison ignores capitals, because forgetting them is the commonest slip; the text then
    says that gin does not ignore them. `shown` maps candidates to what the text calls them.
    """
    known = {c.casefold(): c for c in candidates}
    names = {c: shown[c] if shown else c for c in known.values()}
    exact = known.get(word.casefold())
    if exact not in (None, word):
        return f" Did you mean {names[exact]}? Names are case-sensitive."
    alike = [c for c in known if abs(len(c) - len(word)) <= max(2, len(word) // 2)]
    close = difflib.get_close_matches(word.casefold(), alike, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(names[known[c]] for c in close)}?" if close else ""


def settable_fields(cls: type) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass that its constructor takes, in order."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def has_default(field: dataclasses.Field) -> bool:
    """Whether the field may stay unbound."""
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def describe(wanted: Any, names: Names) -> str:
    """An annotation in the words a gin file uses: `int or None`, `@Text()`, `'a' or 'b'`."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return "anything"
    if wanted is type(None):
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a, names) for a in args)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in args)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"a tuple of {describe(args[0], names)}"
    if origin is tuple:
        return f"({', '.join(describe(a, names) for a in args)})"
    if wanted in (bool, int, float, str, tuple):
        return wanted.__name__
    accepted = [f"@{name}()" for cls, name in names.items() if issubclass(cls, wanted)]
    return " or ".join(accepted) or wanted.__name__


def conform(value: Any, wanted: Any) -> Any:
    """`value` as the annotation wants it (an int becomes a float where a float is wanted).

    Raises:
        Mismatch: the value does not fit.
        TypeError: the annotation itself is of a kind that gin files cannot express.
    """
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _conform_union(value, args)
    if origin is typing.Literal:
        if any(value == a and type(value) is type(a) for a in args):
            return value
        raise Mismatch(nearest(value, map(str, args)).strip() if isinstance(value, str) else "")
    if wanted is tuple or origin is tuple:
        return _conform_tuple(value, args)
    if wanted is type(None):
        if value is None:
            return None
        raise Mismatch("")
    if wanted in (bool, int, float, str):
        return _conform_scalar(value, wanted)
    if isinstance(wanted, type):
        return _conform_instance(value, wanted)
    raise TypeError(f"annotation {wanted!r} is not supported in a configurable dataclass")


def _conform_union(value: Any, members: tuple[Any, ...]) -> Any:
    exact = [m for m in members if m is type(value)]
    fixes = []
    for member in exact or members:
        try:
            return conform(value, member)
        except Mismatch as mismatch:
            fixes.append(str(mismatch))
    raise Mismatch(next((fix for fix in fixes if fix), ""))


def _conform_tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, list):
        raise Mismatch(f"Write a tuple: {tuple(value)!r}.")
    if not isinstance(value, tuple):
        raise Mismatch("" if isinstance(value, Reference) else f"Write a tuple: ({value!r},).")
    if not args:
        return value
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(conform(item, args[0]) for item in value)
    if len(value) != len(args):
        raise Mismatch(f"It has {len(value)} items and {len(args)} are wanted.")
    return tuple(conform(item, wanted) for item, wanted in zip(value, args, strict=True))


def _conform_scalar(value: Any, wanted: type) -> Any:
    if type(value) is wanted:
        return value
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is str and isinstance(value, (bool, int, float)):
        raise Mismatch(f"Write it in quotes: '{value}'.")
    if wanted is bool and value in (0, 1, "True", "False", "true", "false"):
        yes = value in (1, "True", "true")
        raise Mismatch(f"Write {yes}{' without quotes' if isinstance(value, str) else ''}.")
    if wanted is int and isinstance(value, float) and value.is_integer():
        raise Mismatch(f"Write {int(value)}, without a point or an exponent.")
    if wanted in (int, float) and isinstance(value, str):
        try:
            wanted(value)
        except ValueError:
            raise Mismatch("") from None
        raise Mismatch(f"Write {value.strip()} without quotes.")
    raise Mismatch("")


def _conform_instance(value: Any, wanted: type) -> Any:
    if not isinstance(value, Reference):
        raise Mismatch("")
    if value.target is None or not issubclass(value.target, wanted):
        raise Mismatch("")
    if not value.call:
        raise Mismatch(f"Write {value}() with parentheses: the object, not its class.")
    return value


def references(value: Any) -> list[Reference]:
    """Every reference inside a value, tuples included."""
    if isinstance(value, Reference):
        return [value]
    if isinstance(value, tuple):
        return [r for item in value for r in references(item)]
    return []


def literal(value: Any) -> str:
    """A value as a gin file writes it.

    Raises:
        ValueError: NaN, which gin cannot express.
    """
    if isinstance(value, tuple):
        return f"({', '.join(literal(v) for v in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("nan cannot be written in a gin file; use None or a number")
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return repr(value) if isinstance(value, (str, float)) else str(value)


def operative_text(root: Any, names: Names) -> str:
    """Gin text of every field of every object under `root`; parsing it gives an equal object.

    Objects of one class that differ get scopes named after the field that holds them.
    """
    placed: list[tuple[Any, Reference]] = []
    sections: list[str] = []

    def place(obj: Any, path: str) -> Reference:
        for other, reference in placed:
            if type(other) is type(obj) and other == obj:
                return reference
        name = names[type(obj)]
        taken = {r.scope for _, r in placed}
        first = all(r.name != name for _, r in placed)
        scope = "" if first else next(s for s in _candidates(path) if s not in taken)
        reference = Reference(name, scope)
        placed.append((obj, reference))
        index = len(sections)
        sections.append("")
        lines = [f"# {reference.path}"]
        for field in settable_fields(type(obj)):
            value = write(getattr(obj, field), f"{path}_{field}" if path else field)
            lines.append(f"{reference.path}.{field} = {literal(value)}")
        sections[index] = "\n".join(lines)
        return reference

    def write(value: Any, path: str) -> Any:
        if dataclasses.is_dataclass(value):
            return place(value, path)
        if isinstance(value, tuple):
            return tuple(write(item, f"{path}_{i}") for i, item in enumerate(value))
        return value

    place(root, "")
    return "\n\n".join(sections) + "\n"


def _candidates(path: str) -> Iterable[str]:
    yield path
    number = 2
    while True:
        yield f"{path}_{number}"
        number += 1


def as_json(value: Any, names: Names) -> Any:
    """Nested dicts and lists; each object carries its gin name under "class"."""
    if dataclasses.is_dataclass(value):
        fields = {f: as_json(getattr(value, f), names) for f in settable_fields(type(value))}
        return {"class": names[type(value)], **fields}
    if isinstance(value, tuple):
        return [as_json(item, names) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two configurations as JSON: `sae.k: 16 -> 32`, in dotted order."""
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if before == after and type(before) is type(after):
            continue
        if _are_named(before) and _are_named(after):
            before, after = ({item["name"]: item for item in one} for one in (before, after))
        both = isinstance(before, Mapping) and isinstance(after, Mapping)
        if both and before.get("class") == after.get("class"):
            found += [f"{key}.{line}" for line in config_differences(before, after)]
        else:
            found.append(f"{key}: {_brief(before)} -> {_brief(after)}")
    return found


def _are_named(value: Any) -> bool:
    """Whether it is a list of objects of which each has a name."""
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and "name" in item for item in value
    )


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"@{value.get('class')}()"
    return value if value == "(absent)" else repr(value)
