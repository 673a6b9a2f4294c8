"""The bindings of a run, merged and judged before anything is built.

By itself gin lets misspelt scopes, unused and doubled bindings and mistyped values pass. Here every
one of them is a `ValueError` with the place it was written. No gin is needed for that: `config.py`
reads the files into `Binding`s and builds what a `Plan` has approved.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from saejax import schema
from saejax.schema import Reference, nearest

Key = tuple[str, str, str]  # scope, configurable (empty for a macro), field (or the macro's name)


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME` in a gin file."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


REQUIRED = Macro("gin.REQUIRED")  # gin's own word for a value that a later file must set


@dataclasses.dataclass(frozen=True)
class Binding:
    """One `scope/Name.field = value`, and where it was written."""

    key: Key
    value: Any
    where: str

    def __str__(self) -> str:
        scope, name, field = self.key
        return f"{scope}/{name}.{field}".replace("/.", "/").removeprefix("/")


def merge(sources: Sequence[Sequence[Binding]]) -> dict[Key, Binding]:
    """Later sources override earlier ones; inside one source a second binding is an error."""
    merged: dict[Key, Binding] = {}
    for source in sources:
        seen: dict[Key, Binding] = {}
        for binding in source:
            if binding.key in seen:
                first, second = seen[binding.key].where, binding.where
                raise ValueError(f"{second}: {binding} was bound already at {first}; keep one.")
            seen[binding.key] = binding
        merged.update(seen)
    return merged


def inline_macros(bindings: Mapping[Key, Binding]) -> dict[Key, Binding]:
    """Bindings of fields with every `%NAME` replaced; unknown and unused macros are errors."""
    macros = {b.key[2]: b for b in bindings.values() if not b.key[1]}
    used: set[str] = set()

    def expand(value: Any, where: str, inside: tuple[str, ...] = ()) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(expand(v, where, inside) for v in value)
        if not isinstance(value, Macro) or value == REQUIRED:
            return value
        if value.name not in macros:
            raise ValueError(f"{where}: unknown macro {value}.{nearest(value.name, macros)}")
        if value.name in inside:
            raise ValueError(f"{where}: macro {value} refers to itself.")
        used.add(value.name)
        return expand(macros[value.name].value, where, (*inside, value.name))

    fields = {
        key: dataclasses.replace(b, value=expand(b.value, b.where))
        for key, b in bindings.items()
        if key[1]
    }
    for name in macros:
        if name not in used:
            raise ValueError(
                f"{macros[name].where}: macro {name} is never used; use it as %{name} or remove it."
                f"{nearest(name, used)}"
            )
    return fields


class Plan:
    """The objects a run will build and the bindings each one takes; checked on creation.

    Attributes:
        classes: configurable name -> dataclass.
        bindings: every binding, its value as the field's annotation wants it.
        objects: (scope, name) -> field -> the binding that object takes.

    Raises:
        ValueError: unknown field, mistyped value, missing required field, unused binding.
    """

    def __init__(self, bindings: Mapping[Key, Binding], classes: Mapping[str, type], root: str):
        self.classes = classes
        self.names = {cls: name for name, cls in classes.items()}
        self.hints = {name: typing.get_type_hints(cls) for name, cls in classes.items()}
        self.bindings = {key: self._checked(b) for key, b in bindings.items()}
        self.objects: dict[tuple[str, str], dict[str, Binding]] = {}
        self._walk(Reference(root), scope="", inside=())
        self._refuse_leftovers()

    def _checked(self, binding: Binding) -> Binding:
        """The binding with its value as the field wants it."""
        _, name, field = binding.key
        if field not in schema.settable_fields(self.classes[name]):
            near = self._near(binding)
            raise ValueError(f"{binding.where}: {name} has no field {field!r}.{near}")
        if binding.value == REQUIRED:
            return binding
        value, wanted = self._resolve(binding.value), self.hints[name][field]
        try:
            return dataclasses.replace(binding, value=schema.conform(value, wanted))
        except schema.Mismatch as fix:
            allowed = schema.describe(wanted, self.names)
            advice = f" {fix}" if str(fix) else ""
            raise ValueError(
                f"{binding.where}: {binding} = {schema.literal(value)} must be {allowed}.{advice}"
            ) from None

    def _near(self, binding: Binding) -> str:
        """Near fields of the class; else the classes that do have such a field; else all fields."""
        _, name, field = binding.key
        own = schema.settable_fields(self.classes[name])
        owners = [n for n, cls in self.classes.items() if field in schema.settable_fields(cls)]
        if owners and not nearest(field, own):
            return f" {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} one."
        return nearest(field, own) or f" It has {', '.join(own)}."

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, Reference):
            return dataclasses.replace(value, target=self.classes[value.name])
        if isinstance(value, (tuple, list)):
            return type(value)(self._resolve(v) for v in value)
        return value

    def _walk(self, reference: Reference, scope: str, inside: tuple[Reference, ...]) -> None:
        # As in gin: a reference without a scope stays in the scope of the object that holds it,
        # and a scope a/b takes the bindings of no scope, then of a, then of a/b.
        here = Reference(reference.name, reference.scope or scope)
        if here in inside:
            raise ValueError(f"{here} contains itself; bind another object at one of its fields.")
        taken = {
            field: binding
            for prefix in _prefixes(here.scope)
            for (s, name, field), binding in self.bindings.items()
            if (s, name) == (prefix, here.name)
        }
        self._refuse_missing(here, taken)
        self.objects[here.scope, here.name] = taken
        for binding in taken.values():
            for inner in schema.references(binding.value):
                self._walk(inner, here.scope, (*inside, here))

    def _refuse_missing(self, here: Reference, taken: Mapping[str, Binding]) -> None:
        required = {f for f, b in taken.items() if b.value == REQUIRED}
        missing = [
            f"{here.path}.{f.name}"
            for f in schema.settable_fields(self.classes[here.name]).values()
            if f.name in required or (f.name not in taken and not schema.has_default(f))
        ]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} must be bound: no default; add a binding to the gin file or "
                f"--gin_bindings='{missing[0]} = ...'."
            )

    def _refuse_leftovers(self) -> None:
        reached = {(prefix, name) for scope, name in self.objects for prefix in _prefixes(scope)}
        left = [b for (scope, name, _), b in self.bindings.items() if (scope, name) not in reached]
        if left:
            others = ", ".join(map(str, left[1:5]))
            more = f" (and {len(left) - 1} more: {others})" if others else ""
            why = self._why_unused(left[0])
            raise ValueError(f"{left[0].where}: {left[0]} is never used{more}: {why}")

    def _why_unused(self, binding: Binding) -> str:
        scope, name, _ = binding.key
        scopes = {s for s, n in self.objects if n == name}
        if scopes:
            entered = ", ".join(sorted(s or "(none)" for s in scopes))
            near = nearest(scope, scopes)
            return f"no {name} is built in scope {scope!r}; its scopes are {entered}.{near}"
        alone = {self.classes[name]: name}
        holders = [
            f"{owner}.{field} = @{name}()"
            for owner, hints in self.hints.items()
            for field, wanted in hints.items()
            if f"@{name}()" in schema.describe(wanted, alone)
        ]
        fix = f"bind {' or '.join(holders)}, or remove it" if holders else "remove it"
        return f"no {name} is built; {fix}."


def _prefixes(scope: str) -> list[str]:
    """`a/b` -> ['', 'a', 'a/b']."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]
