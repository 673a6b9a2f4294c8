"""Training material of the embedded subject: the standard library, its tests, the dependencies.

Nothing that is held out may leak into it. A file is left out when
* its path is that of a held-out file, or ends in it (a copy elsewhere);
* its text equals that of another file already taken, or of a held-out one;
* it shares more than `MAX_SHARED` of its distinct long lines with one held-out file, or holds more
  than `MAX_SHARED` of that file's.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator

from saejax.data import corpus
from saejax.data.corpus import Document

MAX_SHARED = 0.2
LONG_LINE = 20  # characters; shorter lines ("return None") are in every file
# What saejax stands on; their requirements are followed.
ROOTS = (
    *("jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "gin-config", "absl-py"),
    *("numpy", "scipy", "safetensors", "matplotlib"),
)


@dataclasses.dataclass(frozen=True)
class Material:
    """What the subject is trained and measured on.

    Attributes:
      library: standard library modules, the main part; the tokenizer is trained on them.
      other: standard library tests and the dependencies' modules.
      held_out: standard library modules that nothing was trained on.
      packages: (name, version, licence) of the dependencies that gave files.
      left_out: number of files left out by reason.
    """

    library: list[Document]
    other: list[Document]
    held_out: list[Document]
    packages: list[tuple[str, str, str]]
    left_out: dict[str, int]


def collect() -> Material:
    """Reads all material from this machine's interpreter and installed packages."""
    config = corpus.TextConfig()
    held_out = corpus.read_documents(config, "held_out")
    gate = _Gate(held_out)
    library = [d for d in corpus.read_documents(config, "train") if gate.admits(d)]
    other = [d for d in _library_tests() if gate.admits(d)]
    packages = []
    for distribution in _distributions(ROOTS):
        taken = [d for d in _modules(distribution) if gate.admits(d)]
        if taken:
            name = distribution.metadata["Name"]
            packages.append((name, distribution.version, _licence(distribution)))
        other += taken
    return Material(library, other, held_out, packages, dict(gate.left_out))


class _Gate:
    """Admits each document that neither repeats nor resembles what is held out."""

    def __init__(self, held_out: list[Document]):
        self._paths = tuple(d.name for d in held_out)
        self._texts = {d.text for d in held_out}
        self._lines = [_long_lines(d.text) for d in held_out]
        self._owners: dict[str, list[int]] = {}
        for index, lines in enumerate(self._lines):
            for line in lines:
                self._owners.setdefault(line, []).append(index)
        self.left_out: Counter[str] = Counter()

    def admits(self, document: Document) -> bool:
        reason = self._reason(document)
        if reason:
            self.left_out[reason] += 1
        self._texts.add(document.text)
        return not reason

    def _reason(self, document: Document) -> str:
        if any(f"/{document.name}".endswith(f"/{path}") for path in self._paths):
            return "path of a held-out file"
        if document.text in self._texts:
            return "exact duplicate"
        lines = _long_lines(document.text)
        shared = Counter(owner for line in lines for owner in self._owners.get(line, ()))
        for owner, count in shared.items():
            if count > MAX_SHARED * min(len(lines), len(self._lines[owner])):
                return "shares lines with a held-out file"
        return ""


def _long_lines(text: str) -> set[str]:
    return {line for raw in text.splitlines() if len(line := raw.strip()) >= LONG_LINE}


def _library_tests() -> Iterator[Document]:
    """Tests of the standard library, and the two folders that `corpus` passes over."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    packages = frozenset(("site-packages", "dist-packages", "__pycache__"))
    for name in corpus.walk(root, (".py",), packages):
        folders = set(name.split("/")[:-1])
        if folders & corpus.SKIPPED_FOLDERS and 200 < (root / name).stat().st_size < 400_000:
            if text := _declared_text(root / name):
                yield Document(name, text)


def _declared_text(path: pathlib.Path) -> str:
    """Text of a module, or '' where a test file is deliberately badly encoded."""
    raw = path.read_bytes()
    return raw.decode("utf-8").replace("\r\n", "\n") if _is_utf8(raw) else ""


def _is_utf8(raw: bytes) -> bool:
    return "\ufffd" not in raw.decode("utf-8", errors="replace")


def _distributions(names: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """Installed distributions reached from `names` by requirements without extras, sorted."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = list(names)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        installed = list(importlib.metadata.distributions(name=name))
        if name in found or not installed:
            continue
        found[name] = installed[0]
        for requirement in installed[0].requires or []:
            if "extra ==" not in requirement:
                pending.append(re.match(r"[\w.-]+", requirement).group())
    return [found[name] for name in sorted(found)]


def _modules(distribution: importlib.metadata.Distribution) -> Iterator[Document]:
    for file in sorted(distribution.files or [], key=str):
        name = file.as_posix()
        if not name.endswith(".py") or name.startswith("..") or _is_test(name):
            continue
        path = pathlib.Path(distribution.locate_file(file))
        if 200 < path.stat().st_size < 400_000 and (text := _declared_text(path)):
            yield Document(name, text)


def _is_test(name: str) -> bool:
    parts = name.split("/")
    tests = {"test", "tests", "testing", "idle_test"}
    return bool(tests & set(parts)) or parts[-1].startswith("test_") or "_test.py" in parts[-1]


def _licence(distribution: importlib.metadata.Distribution) -> str:
    metadata = distribution.metadata
    stated = metadata.get("License-Expression") or metadata.get("License") or ""
    classifiers = [
        c.split("::")[-1].strip()
        for c in metadata.get_all("Classifier") or []
        if c.startswith("License ::") and not c.endswith("OSI Approved")
    ]
    short = stated.strip().splitlines()[0] if stated.strip() else ""
    is_name = 0 < len(short) <= 60 and re.match(r"[A-Za-z0-9]", short)
    if is_name and not short.startswith(("Copyright", "License agreement")):
        return short
    return "; ".join(classifiers) or "see the package"
