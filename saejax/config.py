"""From gin files and bindings to one checked `Experiment`; the only file that imports gin.

gin binds an allow-list of frozen dataclasses that know nothing of it. Statements are read with
gin's parser, judged by `bindings.py` (gin lets many faults pass, and its files may import any
module), and only then handed to gin, which builds the objects. Every fault is one message with its
file and line.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import tokenize
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import gin.config_parser as grammar

from saejax import schema
from saejax.bindings import REQUIRED, Binding, Macro, Plan, inline_macros, merge
from saejax.schema import Reference, config_differences, nearest

__all__ = ["CONFIGURABLES", "config_differences", "list_configurables", "load_experiment"]

if not hasattr(gin, "register"):
    raise ImportError(
        f"`import gin` found {list(getattr(gin, '__path__', []))}, not the gin library: install "
        "gin-config==0.5.0, and never put an __init__.py into the folder gin/ of this repository"
    )

CONFIGURABLES: dict[str, str] = {
    "Experiment": "saejax.run:Experiment",
    "HarvestRun": "saejax.harvest_run:HarvestRun",
    "Several": "saejax.several:Several",
    "Member": "saejax.several:Member",
    "Harvest": "saejax.subjects.harvest:HarvestConfig",
    "Stored": "saejax.sources:StoredConfig",
    "Stream": "saejax.subjects.streaming:StreamConfig",
    "Synthetic": "saejax.data.synthetic:SyntheticConfig",
    "Text": "saejax.data.corpus:TextConfig",
    "Tokens": "saejax.data.token_arrays:TokensConfig",
    "Images": "saejax.data.images:ImagesConfig",
    "Loader": "saejax.data.loader:LoaderConfig",
    "SAE": "saejax.model.sae:SAEConfig",
    "Loss": "saejax.train.loss:LossConfig",
    "Optimizer": "saejax.train.optim:OptimizerConfig",
    "Train": "saejax.train.loop:TrainConfig",
    "TopK": "saejax.capacity:TopKConfig",
    "Mesh": "saejax.mesh:MeshConfig",
    "Kernels": "saejax.train.spec:KernelConfig",
    "Guard": "saejax.train.guard:GuardConfig",
    "Watchdog": "saejax.watchdog:WatchdogConfig",
    "Checkpoint": "saejax.checkpoint:CheckpointConfig",
    "Evaluation": "saejax.evals.suite:EvaluationConfig",
    "Report": "saejax.viewer.report:ReportConfig",
}

ROOTS = ("Experiment", "HarvestRun", "Several")
"""What a run may be; each has `plan` and `run`."""

Table = Mapping[str, str]


def load_experiment(
    gin_files: Sequence[str],
    gin_bindings: Sequence[str] = (),
    *,
    table: Table = CONFIGURABLES,
    root: str | None = None,
) -> tuple[Any, str, dict[str, Any]]:
    """Reads, checks and builds one run: an experiment, or a harvest alone.

    Args:
        gin_files: paths, found from the working directory, a checkout or the installed package;
            later files override earlier ones, and a file overrides what it includes.
        gin_bindings: further bindings that override every file.
        table: configurable name -> "module:class", imported only when needed.
        root: the configurable to build; None for the one of `ROOTS` that has bindings.

    Returns:
        The object, its operative configuration as gin text (every field of every object, which
        parses back into an equal object), and the same as nested dicts for JSON.

    Raises:
        FileNotFoundError: a gin file is missing.
        ValueError: anything wrong inside one.
    """
    sources = _Reader(table).read(gin_files, gin_bindings)  # imports nothing: typos show at once
    bindings = inline_macros(merge(sources))
    root = root or _root_of(bindings.values())
    plan = Plan(bindings, load_classes(table), root)
    built = _build(plan, root)
    return built, schema.operative_text(built, plan.names), schema.as_json(built, plan.names)


def _root_of(bindings: Iterable[Binding]) -> str:
    bound = {b.key[1]: b for b in bindings if b.key[1] in ROOTS}
    if len(bound) > 1:
        places = " and ".join(f"{b} ({b.where})" for b in bound.values())
        raise ValueError(f"{places} are two runs; bind fields of one of {', '.join(ROOTS)}.")
    return next(iter(bound), ROOTS[0])


def load_classes(table: Table = CONFIGURABLES) -> dict[str, type]:
    """The dataclass behind each name of the allow-list; imports their modules."""
    targets = {name: target.partition(":") for name, target in table.items()}
    return {
        name: getattr(importlib.import_module(module), attribute)
        for name, (module, _, attribute) in targets.items()
    }


def list_configurables(table: Table = CONFIGURABLES) -> str:
    """Every configurable with its first line of documentation, fields, types and defaults."""
    classes = load_classes(table)
    names = {cls: name for name, cls in classes.items()}
    blocks = []
    for name, cls in classes.items():
        hints = typing.get_type_hints(cls)
        lines = [f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}"]
        for field in schema.settable_fields(cls).values():
            default = _default_text(field, names)
            lines.append(f"  {field.name}: {schema.describe(hints[field.name], names)} {default}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _default_text(field: dataclasses.Field, names: schema.Names) -> str:
    if not schema.has_default(field):
        return "(required)"
    made = field.default_factory is not dataclasses.MISSING
    value = field.default_factory() if made else field.default
    return f"= @{names[type(value)]}()" if type(value) in names else f"= {schema.literal(value)}"


# --- Finding and reading files -------------------------------------------------------------------


def search_roots() -> list[Path]:
    """Where gin files are looked for: the working directory, a checkout, the installed package."""
    return list(dict.fromkeys([Path.cwd(), *_own_roots()]))


def _own_roots() -> list[Path]:
    package = Path(__file__).resolve().parent
    checkout = [package.parent] if (package.parent / "setup.py").is_file() else []
    return [*checkout, package]


def shipped_files() -> list[str]:
    """The run files that come with saejax, as `--gin_file` takes them."""
    found = {f"gin/{f.name}" for root in _own_roots() for f in (root / "gin").glob("*.gin")}
    return sorted(found - {"gin/base.gin"})  # a part of runs, not one


def find_file(name: str, roots: Sequence[Path] = (), asked: str = "") -> Path:
    """The first existing file called `name` under `roots` and the search roots."""
    roots = list(dict.fromkeys([*roots, *search_roots()]))
    for root in roots:
        if (root / name).is_file():
            return root / name
    beside = [str(Path(name).parent / f.name) for f in (Path.cwd() / name).parent.glob("*.gin")]
    stems = {Path(file).stem: file for file in [*shipped_files(), *beside]}
    near = nearest(Path(name).stem, stems, shown=stems)
    looked = Path(name).parent if Path(name).is_absolute() else ", ".join(map(str, roots))
    raise FileNotFoundError(f"gin file {name!r}{asked} does not exist; looked in {looked}.{near}")


class _Delegate(grammar.ParserDelegate):
    """Turns references and macros into plain values, so that reading needs no registry."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(name, scope, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


class _Reader:
    """Reads files and flags into lists of bindings, one list a source, in order of precedence."""

    def __init__(self, table: Table):
        self.table = table
        self.seen: dict[Path, str] = {}
        self.sources: list[list[Binding]] = []

    def read(self, files: Sequence[str], flags: Sequence[str]) -> list[list[Binding]]:
        for name in files:
            path = find_file(name)
            if path.resolve() in self.seen:
                raise ValueError(f"gin file {name!r} is read twice; name it once.")
            self._read_file(path, name, depth=0)
        given = []
        for text in flags:
            label = f"--gin_bindings={text!r}"
            statements = self._statements(text, label, numbered=False)
            if not statements:
                raise ValueError(f"{label} holds no binding; write 'Name.field = value'.")
            for statement, where in statements:
                if isinstance(statement, grammar.IncludeStatement):
                    raise ValueError(f"{where}: use --gin_file to read another file.")
                given.append(self._binding(statement, where))
        self.sources.append(given)
        return self.sources

    def _read_file(self, path: Path, label: str, depth: int) -> None:
        self.seen[path.resolve()] = label
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"gin file {label} is not UTF-8 at byte {error.start}.") from None
        own: list[Binding] = []
        for statement, where in self._statements(text, label):
            if isinstance(statement, grammar.IncludeStatement):
                self._include(statement.filename, path, where, depth, after_bindings=bool(own))
            else:
                own.append(self._binding(statement, where))
        self.sources.append(own)

    def _include(self, name: str, parent: Path, where: str, depth: int, after_bindings: bool):
        if depth:
            raise ValueError(f"{where}: an included file may not include another ({name!r}).")
        if after_bindings:
            raise ValueError(
                f"{where}: `include {name!r}` stands after bindings and would override them; move "
                "it to the top of the file."
            )
        # The file's own neighbours come first, so that a run file copied anywhere keeps its base.
        roots = [parent.resolve().parent, parent.resolve().parent.parent]
        path = find_file(name, roots, asked=f" (included at {where})")
        if path.resolve() not in self.seen:
            self._read_file(path, name, depth + 1)

    def _statements(self, text: str, label: str, numbered: bool = True) -> list[tuple[Any, str]]:
        """(statement, where) pairs; block headers, which bind nothing, are left out."""
        found = []
        try:
            for statement in grammar.ConfigParser(text, _Delegate()):
                line = statement.location.line_num
                if not isinstance(statement, grammar.BlockDeclaration):
                    found.append((statement, f"{label}:{line}" if numbered else label))
        except (SyntaxError, tokenize.TokenError) as error:
            raise ValueError(_syntax_message(error, text, label, numbered)) from None
        for statement, where in found:
            if isinstance(statement, grammar.ImportStatement):
                raise ValueError(
                    f"{where}: `{statement.format()}` is refused: gin files are configuration, "
                    "not code; they hold `include` and bindings only."
                )
        return found

    def _binding(self, statement: grammar.BindingStatement, where: str) -> Binding:
        key = (statement.scope, statement.selector, statement.arg_name)
        if not statement.arg_name:
            key = (statement.scope, "", statement.selector)
        binding = Binding(key, statement.value, where)
        if key[1]:
            _check_name(key[1], self.table, f"{where}: {binding}")
        elif key[0] or not re.fullmatch(r"[A-Z][A-Z0-9_]*", key[2]):
            raise ValueError(
                f"{where}: `{binding}` binds neither a field nor a macro; write Name.field = value "
                f"for a field, and a macro's name in capitals.{nearest(key[2], self.table)}"
            )
        for reference in _references(statement.value):
            _check_name(reference.name, self.table, f"{where}: {binding} = {reference}")
        return binding


def _check_name(name: str, table: Table, context: str) -> None:
    if name not in table:
        near = nearest(name, table) or f" There are {', '.join(table)}."
        raise ValueError(f"{context}: unknown configurable {name!r}.{near}")


def _references(value: Any) -> list[Reference]:
    """References anywhere in a value as parsed: gin's lists and dicts included."""
    if isinstance(value, dict):
        value = (*value.keys(), *value.values())
    if isinstance(value, (list, tuple)):
        return [r for item in value for r in _references(item)]
    return [value] if isinstance(value, Reference) else []


def _syntax_message(error: Exception, text: str, label: str, numbered: bool) -> str:
    if isinstance(error, SyntaxError):
        message, line = error.msg.splitlines()[0], error.lineno or 1
    else:
        message, (line, _) = error.args
    lines = text.splitlines() or [""]
    shown = lines[min(line, len(lines)) - 1].strip()
    token = re.search(r"Failed to parse token '([A-Za-z_]\w*)'", str(error))
    constants = {"true": "True", "false": "False", "none": "None", "null": "None"}
    if token and token[1].casefold() in constants:
        constant = constants[token[1].casefold()]
        fix = f"write {constant}, or '{token[1]}' in quotes where a name is meant"
        message = f"{token[1]} is no value"
    elif token:
        message, fix = f"{token[1]} is no value", f"strings need quotes: '{token[1]}'"
    else:
        fix = "write `Name.field = value`, one binding a line, strings in quotes"
    where = f"{label}:{line}" if numbered else label
    return f"{where}: `{shown}` is no valid gin: {message.rstrip('.')}; {fix}."


# --- Building ------------------------------------------------------------------------------------


_REGISTERED: dict[str, type] = {}  # gin's registry is global and has no public way to ask


def _build(plan: Plan, root: str) -> Any:
    """Hands gin the classes and the approved bindings, and builds the root.

    gin's state is cleared before and after, so that one process may load many configurations.
    """
    with gin.config.interactive_mode():  # a module reloaded in a notebook registers anew
        for name, cls in plan.classes.items():
            if _REGISTERED.get(_selector(name, cls)) is not cls:
                gin.register(name, module=cls.__module__)(cls)
                _REGISTERED[_selector(name, cls)] = cls
    lines = []
    for (scope, name, field), binding in plan.bindings.items():
        if binding.value != REQUIRED:
            target = Reference(_selector(name, plan.classes[name]), scope).path
            lines.append(f"{target}.{field} = {schema.literal(_in_full(binding.value))}")
    gin.clear_config()
    try:
        gin.parse_config(lines)
        return gin.get_configurable(_selector(root, plan.classes[root]))()
    except ValueError as error:
        raise ValueError(_explain(str(error), plan)) from error
    finally:
        gin.clear_config()


def _selector(name: str, cls: type) -> str:
    return f"{cls.__module__}.{name}"


def _in_full(value: Any) -> Any:
    """References with the module in their name, as gin has them registered."""
    if isinstance(value, Reference):
        return dataclasses.replace(value, name=_selector(value.name, value.target))
    return tuple(_in_full(v) for v in value) if isinstance(value, tuple) else value


def _explain(message: str, plan: Plan) -> str:
    """One line from what gin makes of an exception of `__post_init__`: object, text, source."""
    text, _, call = message.partition("\n  In call to configurable ")
    found = re.match(r"'(\w+)' .*?(?: in scope '([^']*)')?$", call.partition("\n")[0])
    if not found:
        return message
    here = Reference(found[1], found[2] or "")
    taken = plan.objects[here.scope, here.name]
    named = [b for field, b in taken.items() if re.search(rf"\b{field}\b", text)]
    origin = f" ({'; '.join(f'{b} at {b.where}' for b in named)})" if named else ""
    return f"{here.path}: {text}{origin}"
