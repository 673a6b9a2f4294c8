"""Collectives of a compiled program, read from its text: kind, bytes, calls and mesh axis.

Bytes are of the full array: what an all-gather makes, what a reduce-scatter, an all-reduce or an
all-to-all takes, per device and call. A collective in a loop counts once a trip; of the branches of
a conditional, the one that moves most counts, and of those alike the one that calls most. Each is
named by the `jax.named_scope` it was traced under. What cannot be followed is an error: a
collective that is missed would pass for one saved.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from saejax.mesh import DATA, LATENT, MeshShape

UNNAMED = "unnamed"
"""Name of a collective that was traced under none of the known scopes."""

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ITEM = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|async_wrapped|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_ANY_COLLECTIVE = re.compile(rf"^\s.* = .* (?:{'|'.join(_KINDS)})(?:-start)?\(", re.MULTILINE)
_SCALARS = 64  # bytes: less is a count or a sum, whatever became of its name
_NEIGHBOURS = 3  # instructions to follow from one whose own origin the compiler dropped


class Unreadable(ValueError):
    """The text of a program has something whose collectives cannot be counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Calls of one kind under one name.

    Attributes:
      name: the scope it was traced under, or `UNNAMED`.
      kind: as XLA calls it.
      axis: 'data', 'latent' or both.
      calls: a step.
      bytes: of the full array, per device and step (all calls).
    """

    name: str
    kind: str
    axis: str
    calls: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def origin(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def kind(self) -> str | None:
        """The collective it starts, or None; the second half of an asynchronous one is None."""
        return next((k for k in _KINDS if self.opcode in (k, f"{k}-start")), None)

    def called(self) -> list[str]:
        """Computations that it runs once; none for the second half of what has one."""
        if self.opcode.endswith(("-done", "-update")):
            return []
        found = _CALLED.findall(_QUOTED.sub("", self.text))
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


_Computation = dict[str, _Instruction]


class Program:
    """The computations of a compiled program.

    Attributes:
      computations: name -> instructions by name.
      entry: name of the one that is run.
    """

    def __init__(self, text: str, shape: MeshShape, scopes: Collection[str]):
        """Parses what `jax.stages.Compiled.as_text()` returns.

        Args:
          text: of one module.
          shape: of the mesh that it was compiled for.
          scopes: names that its collectives were traced under.

        Raises:
          Unreadable: there is no entry, or something that cannot be followed.
        """
        self.computations, self.entry = _parse(text)
        if not self.entry:
            raise Unreadable("the compiled program has no ENTRY computation")
        self._shape, self._scopes = shape, scopes
        visited: set[tuple[str, str]] = set()
        self._found = self._walk(self.entry, "", visited)
        written = len(_ANY_COLLECTIVE.findall(_QUOTED.sub("", text)))
        if written != len(visited):
            raise Unreadable(
                f"the compiled program has {written} collectives, of which {len(visited)} were read"
            )

    def collectives(self, expected: Sequence[Collective] = ()) -> list[Collective]:
        """All of them, those alike in name, kind and axis as one; most bytes first.

        Args:
          expected: what should be there. The compiler drops the origin of some that it rewrites;
            one without a name takes that of an expected one of the same axis, calls and bytes, if
            no other has it.
        """
        merged: dict[tuple[str, str, str], Collective] = {}
        for one in _identify(self._found, expected):
            key = (one.name, one.kind, one.axis)
            if key in merged:
                one = dataclasses.replace(
                    one, calls=one.calls + merged[key].calls, bytes=one.bytes + merged[key].bytes
                )
            merged[key] = one
        return sorted(merged.values(), key=lambda c: (-c.bytes, c.name, c.kind))

    def _walk(self, name: str, caller: str, visited: set[tuple[str, str]]) -> list[Collective]:
        """Of one call of a computation; `caller` is the scope that the call itself has.

        Adds the computation and the name of every collective to `visited`.
        """
        found, body = [], self._computation(name)
        for instruction in body.values():
            if instruction.kind:
                visited.add((name, instruction.name))
                one = self._collective(instruction, body, name, caller)
                found += [one] if one.axis else []  # among one device each: no traffic
                continue
            scope = self._known(instruction.origin) or caller
            if instruction.opcode == "conditional":
                branches = [self._walk(b, scope, visited) for b in _branches(instruction)]
                found += max(branches, key=_traffic, default=[])
                continue
            inner = [c for n in instruction.called() for c in self._walk(n, scope, visited)]
            if instruction.opcode == "while":
                inner = self._repeated(instruction, inner, scope, visited)
            found += inner
        return found

    def _repeated(
        self, loop: _Instruction, body: list[Collective], scope: str, visited: set[tuple[str, str]]
    ) -> list[Collective]:
        """Of all trips of a loop, whose condition runs once more than its body."""
        tests = [c for n in _conditions(loop) for c in self._walk(n, scope, visited)]
        if not (body or tests):
            return []
        trips = self._trips(loop)
        if trips is None:
            raise Unreadable(f"the loop {loop.name} has collectives, and its trips are not known")
        return [
            dataclasses.replace(c, calls=c.calls * n, bytes=c.bytes * n)
            for part, n in ((body, trips), (tests, trips + 1))
            for c in part
        ]

    def _computation(self, name: str) -> _Computation:
        if name not in self.computations:
            raise Unreadable(f"the compiled program calls {name}, which it does not have")
        return self.computations[name]

    def _collective(
        self, instruction: _Instruction, body: _Computation, computation: str, caller: str
    ) -> Collective:
        kind = instruction.kind
        groups = _groups(instruction.text, self._shape.size)
        unknown = [o for o in instruction.operands if o not in body]
        if unknown or not instruction.operands:
            raise Unreadable(f"operands of {instruction.name} are not known: {unknown}")
        size = sum(_bytes(body[o].type) for o in instruction.operands)
        if kind == "all-gather":
            size *= groups.shape[1]
        elif kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"  # how the TPU compiler writes one
        name = self._scope(instruction, body)
        name = (caller or UNNAMED) if name == UNNAMED else name
        return Collective(name=name, kind=kind, axis=self._axis(groups), calls=1.0, bytes=size)

    def _scope(self, instruction: _Instruction, body: _Computation) -> str:
        """The known scope of an instruction, or of what it is computed from if it has no origin."""
        own = self._origin(instruction)
        if own or instruction.origin or instruction.kind is None:
            return own or UNNAMED
        # Only along the data: what indexes it comes from elsewhere.
        least = max((_bytes(body[o].type) for o in instruction.operands if o in body), default=0)
        ring = [instruction.name]
        for _ in range(_NEIGHBOURS):
            above = [body[o] for n in ring for o in body[n].operands if o in body]
            ring = [i.name for i in above if _bytes(i.type) >= least]
            names = [name for n in ring if (name := self._origin(body[n]))]
            if names:
                return names[0]
        return UNNAMED

    def _origin(self, instruction: _Instruction, depth: int = 2) -> str | None:
        """The known scope of an instruction or of anything in the computations it calls."""
        found = self._known(instruction.origin)
        if found or not depth:
            return found
        for called in instruction.called():
            for inner in self.computations.get(called, {}).values():
                if found := self._origin(inner, depth - 1):
                    return found
        return None

    def _known(self, origin: str) -> str | None:
        """The known scopes of an origin: 'auxk tokens' of 'jit(step)/auxk/tokens/all_gather'."""
        parts = [part for part in origin.split("/") if part in self._scopes]
        return " ".join(dict.fromkeys(parts)) or None

    def _axis(self, groups: np.ndarray) -> str:
        rows, columns = groups // self._shape.latent, groups % self._shape.latent
        over_data = bool((rows != rows[:, :1]).any())
        over_latent = bool((columns != columns[:, :1]).any())
        axes = [axis for axis, over in ((DATA, over_data), (LATENT, over_latent)) if over]
        return ", ".join(axes)

    def _trips(self, loop: _Instruction) -> int | None:
        """Trips of a loop: as the compiler annotates, or the constant that its condition holds."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
        if found:
            return int(found[1])
        limits, left = [], _conditions(loop)
        while left:
            for instruction in self._computation(left.pop()).values():
                left += instruction.called()
                constant = re.match(r"(\d+)\)", instruction.text)
                if instruction.opcode == "constant" and constant and "[]" in instruction.type:
                    limits.append(int(constant[1]))
        return max(limits, default=None)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            _, name, type_, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", _inside(rest)))
            current[name] = _Instruction(name, type_, opcode, operands, rest)
    return computations, entry


def _inside(rest: str) -> str:
    """The operands: text up to the parenthesis that closes one opened before it."""
    depth = 1
    for position, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:position]
    return rest


def _conditions(loop: _Instruction) -> list[str]:
    return re.findall(r"\bcondition=%?([\w.\-]+)", loop.text)


def _traffic(found: Sequence[Collective]) -> tuple[float, float]:
    """Bytes and calls: branches that differ in calls alone are told apart by these."""
    return sum(c.bytes for c in found), sum(c.calls for c in found)


def _branches(conditional: _Instruction) -> Iterator[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", conditional.text)
    if found:
        yield from re.findall(r"%?([\w.\-]+)", found[1])
    yield from re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", conditional.text)


def _identify(found: Sequence[Collective], expected: Sequence[Collective]) -> list[Collective]:
    """`found`, with names for those that have none of their own; see `Program.collectives`."""
    known = {one.name for one in expected}
    missing = [one for one in expected if one.name not in {f.name for f in found}]
    named = []
    for one in found:
        if one.name not in known:
            alike = [
                m
                for m in missing
                if (m.axis, m.calls, m.bytes) == (one.axis, one.calls, one.bytes)
                and (one.name == UNNAMED or m.name.startswith(one.name))
            ]
            if alike:
                missing.remove(alike[0])
                one = dataclasses.replace(one, name=alike[0].name)
            elif one.name == UNNAMED and one.bytes <= _SCALARS * one.calls:
                one = dataclasses.replace(one, name="scalars")
        named.append(one)
    return named


def _bytes(type_: str) -> int:
    """Bytes of all arrays in the text of a type."""
    total = 0
    for name, bits, dims in _ARRAY.findall(type_):
        count = math.prod(int(d) for d in dims.split(",") if d)
        total += math.ceil(count * _ITEM.get(name, int(bits or 32) / 8))
    return total


def _groups(text: str, size: int) -> np.ndarray:
    """`[groups, members]`: positions in the mesh, row by row, of devices that take part together.

    A permutation is given as its pairs.
    """
    explicit = r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}"
    if found := re.search(rf"(?:replica_groups|source_target_pairs)={explicit}", text):
        return np.array([[int(i) for i in g.split(",")] for g in found[1][1:-1].split("},{")])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(found[2], found[3]).reshape(_ints(found[1]))
    order = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    named = rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}]*)\}}"
    if found := re.search(named, text):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        ids = _iota(found[2], found[3]) if found[2] else np.arange(size)
        ids = ids.reshape([int(n) for n in axes.values()])
        over = [list(axes).index(axis) for axis in re.findall(r"'([^']+)'", found[4])]
        ids = np.moveaxis(ids, over, range(-len(over), 0))
        return ids.reshape(-1, math.prod(ids.shape[-len(over) :]))
    return np.arange(size)[None]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(permutation)) if permutation else ids


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
