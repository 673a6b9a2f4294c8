"""Documents of text: the Python library that is on every machine, or the user's own files."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import Literal

# Tests and tables are not typical code; the two packages folders are not the standard library.
SKIPPED_FOLDERS = frozenset(
    "test tests idle_test __pycache__ site-packages dist-packages encodings lib2to3".split()
)
_FALLBACK_PACKAGES = ("jax", "flax", "optax", "orbax", "numpy", "absl", "gin")
_PYTHON_BYTES = (200, 400_000)  # stubs say nothing, larger files are generated tables
_ENOUGH_LIBRARY = 1_000_000  # bytes; the standard library of any CPython with source has ten times
_SUFFIXES = (".txt", ".py", ".md", ".jsonl")
_BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with its name (relative path, with `:line` or `:block` where a file has several)."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where the text comes from and how it is split.

    Attributes:
      source: 'python' for the standard library of the running interpreter (of the installed
        dependencies when the interpreter carries no source), otherwise the path of a .txt, .py,
        .md or .jsonl file (one object a line, text in field "text") or of a folder of such.
      held_out_percent: share of the documents held out, chosen by the sha256 of their name. The
        embedded subject was trained with the same rule at 5, so up to 5 it has seen none of
        them (a module renamed since its Python version excepted).
      max_bytes: at most so many bytes of UTF-8 text in each split; whole documents, in the order
        of their hash, are taken while they fit. None takes all.
    """

    source: str = "python"
    held_out_percent: float = 5.0
    max_bytes: int | None = None

    def __post_init__(self):
        if not self.source:
            raise ValueError("Text.source is empty: give 'python' or the path of a file or folder")
        if not 0 <= self.held_out_percent < 100:
            raise ValueError(
                f"Text.held_out_percent = {self.held_out_percent}: allowed are 0 <= percent < 100"
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"Text.max_bytes = {self.max_bytes}: give a positive number or None")


def read_documents(cfg: TextConfig, split: Literal["train", "held_out"]) -> list[Document]:
    """Reads one split of a corpus, sorted by name; a pure function of the files' content.

    Every corpus of two documents or more has at least one in 'train' and, when held_out_percent
    is above 0, at least one in 'held_out'.

    Raises:
      FileNotFoundError: the path does not exist, or no Python source was found.
      ValueError: a file is not UTF-8 text, a .jsonl line has no text, or the split is empty.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split = {split!r}: allowed are 'train' and 'held_out'")
    documents = list(python_documents() if cfg.source == "python" else _path_documents(cfg.source))
    if not documents:
        raise ValueError(
            f"Text.source = {cfg.source!r} holds no text: give a file, or a folder, with "
            f"non-empty {', '.join(_SUFFIXES)} files"
        )
    held = _held_out_names([d.name for d in documents], cfg.held_out_percent)
    chosen = [d for d in documents if (d.name in held) == (split == "held_out")]
    if not chosen:
        raise ValueError(
            f"Text.source = {cfg.source!r} has {len(documents)} document(s) and Text."
            f"held_out_percent = {cfg.held_out_percent}, which leaves the {split} split empty; "
            "give more text (a file, or at least two), or a percentage above 0"
        )
    return sorted(_limited(chosen, cfg), key=lambda d: d.name)


def hash_fraction(name: str) -> float:
    """A number in [0, 1) fixed by the name: the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _held_out_names(names: list[str], percent: float) -> set[str]:
    ordered = sorted(names, key=hash_fraction)
    held = {name for name in names if hash_fraction(name) < percent / 100}
    if percent > 0 and len(ordered) > 1:
        held.add(ordered[0])
        held.discard(ordered[-1])
    return held


def _limited(documents: list[Document], cfg: TextConfig) -> list[Document]:
    if cfg.max_bytes is None:
        return documents
    taken, left = [], cfg.max_bytes
    for document in sorted(documents, key=lambda d: hash_fraction(d.name)):
        size = len(document.text.encode())
        if size <= left:
            taken.append(document)
            left -= size
    if not taken:
        smallest = min(len(d.text.encode()) for d in documents)
        raise ValueError(
            f"Text.max_bytes = {cfg.max_bytes} is less than the smallest document of the split: "
            f"give at least {smallest}"
        )
    return taken


def walk(root: pathlib.Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> Iterator[str]:
    """Relative paths (with '/') of the files under a folder, sorted; hidden ones are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        for name in sorted(files):
            if name.endswith(suffixes) and not name.startswith("."):
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


def python_files(root: pathlib.Path, skipped: frozenset[str]) -> Iterator[Document]:
    """Python modules under a folder, decoded by their own declaration (PEP 263)."""
    for name in walk(root, (".py",), skipped):
        if _PYTHON_BYTES[0] < (root / name).stat().st_size < _PYTHON_BYTES[1]:
            yield Document(name, read_python(root / name))


def read_python(path: pathlib.Path) -> str:
    """Text of a Python file by PEP 263, newlines normalised.

    Raises:
      ValueError: its bytes are not what it declares (UTF-8 by default).
    """
    raw = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return io.TextIOWrapper(io.BytesIO(raw), encoding).read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not Python source as it declares: {error}") from error


def python_documents() -> list[Document]:
    """The running interpreter's standard library, or else the dependencies' source.

    Raises:
      FileNotFoundError: neither is there.
    """
    library = list(python_files(pathlib.Path(sysconfig.get_paths()["stdlib"]), SKIPPED_FOLDERS))
    if sum(len(d.text) for d in library) >= _ENOUGH_LIBRARY:
        return library
    documents = []
    for package in _FALLBACK_PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            files = python_files(pathlib.Path(place), SKIPPED_FOLDERS)
            documents += [Document(f"{package}/{d.name}", d.text) for d in files]
    if not documents:
        raise FileNotFoundError(
            "Text.source = 'python': this interpreter has no standard library source, and neither "
            "have the installed packages; give the path of a file or folder of text"
        )
    return documents


def _path_documents(source: str) -> Iterator[Document]:
    root = pathlib.Path(source).expanduser()
    if not root.exists():
        raise FileNotFoundError(
            f"Text.source = {source!r}: no such file or folder; give one that exists, or 'python'"
        )
    if root.is_dir():
        for name in walk(root, _SUFFIXES, frozenset({"__pycache__"})):
            yield from _file_documents(root / name, name)
    elif root.name.endswith(_SUFFIXES):
        documents = list(_file_documents(root, root.name))
        yield from _blocks(documents[0]) if len(documents) == 1 else documents
    else:
        raise ValueError(f"Text.source = {source!r}: a file must end in {', '.join(_SUFFIXES)}")


def _file_documents(path: pathlib.Path, name: str) -> Iterator[Document]:
    text = _read_utf8(path)
    if not name.endswith(".jsonl"):
        if text.strip():
            yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f'{path}, line {number}: each line must be an object with a string field "text"'
            )
        if text.strip():
            yield Document(f"{name}:{number}", text)


def _read_utf8(path: pathlib.Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at byte offset "
            f"{error.start}; convert it (for example `iconv -f latin1 -t utf-8`) or move it away"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _blocks(document: Document) -> Iterator[Document]:
    """Cuts a lone text at line ends into blocks of 64 KiB or more, so that it can be split."""
    size = max(1, min(_BLOCK, len(document.text) // 20))
    lines, length, number = [], 0, 0
    for line in document.text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            yield Document(f"{document.name}:{number}", "".join(lines))
            lines, length, number = [], 0, number + 1
    if "".join(lines).strip():
        yield Document(f"{document.name}:{number}", "".join(lines))
