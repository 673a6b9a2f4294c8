"""Documents of text: the Python library that is on every machine, or the user's own files."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import os
import pathlib
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from saejax.data import readers, splits
from saejax.data.progress import Progress
from saejax.data.readers import EMPTY, HUB, SUFFIXES, Document
from saejax.data.splits import Split

# Tests and tables are not typical code; the two packages folders are not the standard library.
SKIPPED_FOLDERS = frozenset(
    "test tests idle_test __pycache__ site-packages dist-packages encodings lib2to3".split()
)
PYTHON = "python"
Bos = Literal["auto", "none", "document", "context"]
Tails = Literal["drop", "pad"]
_FALLBACK_PACKAGES = ("jax", "flax", "optax", "orbax", "numpy", "absl", "gin")
_PYTHON_BYTES = (200, 400_000)  # stubs say nothing, larger files are generated tables
_ENOUGH_LIBRARY = 1_000_000  # bytes; the standard library of any CPython with source has ten times


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Where the text comes from, how it is split, and how it is cut into contexts.

    Attributes:
      source: 'python' for the standard library of the running interpreter (of the installed
        dependencies when the interpreter carries no source); the path of a .txt, .py, .md, .jsonl,
        .jsonl.gz, .jsonl.zst or .parquet file or of a folder of such, linked folders included
        (those packed with zstandard, and parquet, need the packages zstandard and pyarrow); or
        'hf:owner/name', a dataset of the Hugging Face hub, streamed with the package datasets
        ('hf:/path' for a local folder).
      field: field of a JSON line, or column of a table, that holds the text.
      name: configuration ("subset") of the Hugging Face dataset.
      split: its split; both of ours are cut out of this one.
      revision: its branch, tag or commit.
      held_out_percent: share of the documents held out, chosen by the sha256 of their name. The
        embedded subject was trained with the same rule at 5, so up to 5 it has seen none of
        them (a module renamed since its Python version excepted).
      max_bytes: at most so many bytes of UTF-8 text in each split. None takes all; of an 'hf:'
        source a line in the log says so before it is read.
      max_documents: at most so many documents in each split.
      take: which documents a limit takes. 'sample': whole documents in the order of their hash,
        while they fit; the source is read once to find them. 'first': in reading order, up to the
        first that does not fit; nothing after it is read. 'auto' is 'first' for 'hf:' sources and
        'sample' for all others.
      bos: where a beginning-of-sequence token is put: 'none'; 'document', before each document;
        'context', before each context; 'auto', as the tokenizer's model was trained (GPT-2:
        `<|endoftext|>` before each document; Llama, Gemma: before each context; Pythia: none). It
        is seen by the model, and no activation of it is stored unless `Harvest.keep_special` says
        so.
      tails: what is left of a document after its last full context is dropped ('drop') or padded
        to a context of its own ('pad').
      min_tail: shortest tail that is padded, in tokens; shorter ones are dropped.
      cache: folder in which tokenised text is kept for the next run; None keeps nothing.
    """

    source: str = PYTHON
    field: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    held_out_percent: float = 5.0
    max_bytes: int | None = None
    max_documents: int | None = None
    take: Literal["auto", "sample", "first"] = "auto"
    bos: Bos = "auto"
    tails: Tails = "drop"
    min_tail: int = 16
    cache: str | None = None

    def __post_init__(self):
        if not self.source or self.source == HUB:
            raise ValueError(
                f"Text.source = {self.source!r} is empty: give 'python', the path of a file or "
                "folder, or 'hf:owner/name'"
            )
        for field in ("field", "split"):
            if not getattr(self, field):
                raise ValueError(f"Text.{field} is empty: give a name")
        splits.check(self, "Text", "max_bytes", "max_documents")
        for field, default in (("name", None), ("revision", None), ("split", "train")):
            if getattr(self, field) != default and not self.source.startswith(HUB):
                raise ValueError(
                    f"Text.{field} = {getattr(self, field)!r} is for Hugging Face datasets, and "
                    f"Text.source = {self.source!r} is none; write 'hf:owner/name', or leave it out"
                )


class Documents(splits.SplitReader):
    """The documents of one split of a text; see `splits.SplitReader`.

    `left_out` counts 'empty_documents' (of both splits: no text but white space) and
    'documents_over_limit'.
    """

    def __init__(self, cfg: TextConfig, split: Split, progress: Progress | None = None):
        """Reads nothing yet.

        Args:
          cfg: the text.
          split: 'train' or 'held_out'.
          progress: is told of every document that is read.

        Raises:
          ValueError: no such split.
        """
        super().__init__(cfg, split, label="Text", limit="max_bytes")
        self._progress = progress or Progress(None, "")
        self.first = cfg.take == "first" or (cfg.take == "auto" and cfg.source.startswith(HUB))

    def read(self, left_out: Counter[str]) -> Iterator[Document]:
        """All documents of both splits, by file name and inside a file as they stand."""
        if self.cfg.source == PYTHON:
            return self._progress.reading(sorted(python_documents(), key=lambda d: d.name))
        from_hub = self.cfg.source.startswith(HUB)
        found = (_hub_documents if from_hub else _path_documents)(self.cfg, left_out)
        return self._progress.reading(found)

    def size(self, document: Document) -> int:
        """Bytes of UTF-8."""
        return len(document.text.encode("utf-8", "surrogatepass"))

    def nothing(self) -> str:
        """What to do when there is no text at all."""
        return (
            f"holds no text: give a file, or a folder, with non-empty {', '.join(SUFFIXES)} files"
        )


def read_documents(cfg: TextConfig, split: Split) -> list[Document]:
    """The documents of one split, all in memory.

    Raises:
      FileNotFoundError: the source does not exist, or no Python source was found.
      ValueError: a file is not UTF-8 text, a line has no text, the split is empty, a package is
        missing, ...; names the file and the place in it.
    """
    return list(Documents(cfg, split))


def walk(root: pathlib.Path, suffixes: tuple[str, ...], skipped: frozenset[str]) -> Iterator[str]:
    """Relative paths (with '/') of the files under a folder, sorted; hidden ones are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        for name in sorted(files):
            if name.endswith(suffixes) and not name.startswith("."):
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


def _files_below(
    root: pathlib.Path, suffixes: tuple[str, ...], told: str, skipped: frozenset[str]
) -> list[str]:
    """As `walk`, of a folder that a user gives: endings in any case, linked folders read, too.

    Names go through the links. A folder that is reached in several ways is read once, and by its
    own path if that has no link, so that a loop ends and no document is there twice.

    Args:
      root: the folder.
      suffixes: of the files, in lower case.
      told: begins the message; the field and its value.
      skipped: names of folders that are left out.

    Raises:
      FileNotFoundError: a link leads nowhere.
      ValueError: a name is not UTF-8.
    """
    found, seen, starts = [], set(), [root]
    for start in starts:  # grows by the links that are met
        for folder, folders, files in os.walk(start):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            here = pathlib.Path(folder)
            folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
            starts += [here / f for f in folders if (here / f).is_symlink()]
            for path in (here / name for name in files if not name.startswith(".")):
                ours = path.name.lower().endswith(suffixes)
                # What led to a folder counts as a file once that is gone.
                if (ours or not path.suffix) and path.is_symlink() and not path.exists():
                    raise FileNotFoundError(
                        f"{told}: the link {str(path)!r} leads to {os.readlink(path)!r}, which is "
                        "not there; mend or remove the link"
                    )
                if ours:
                    found.append(_readable(path.relative_to(root).as_posix(), told))
    return sorted(found)


def _readable(name: str, told: str) -> str:
    """The name, by which documents are split and told of."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{told}: the name {name!a} of a file in it is not UTF-8; rename the file, or the "
            "folder that it lies in"
        ) from error
    return name


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


def source_files(source: str) -> list[tuple[pathlib.Path, str]]:
    """The files of `Text.source`; see `named_files`."""
    near = f", {HUB + source!r} for a dataset of the Hugging Face hub" if "/" in source else ""
    return named_files(
        "Text.source", source, SUFFIXES, f"{near}, or 'python'", frozenset({"__pycache__"})
    )


def named_files(
    field: str,
    source: str,
    suffixes: tuple[str, ...],
    otherwise: str = "",
    skipped: frozenset[str] = frozenset(),
) -> list[tuple[pathlib.Path, str]]:
    """The files of a path and what they are called, sorted by name.

    Args:
      field: the setting, for messages.
      source: its value, a file or a folder.
      suffixes: of the files, in lower case; in any case in the names.
      otherwise: what else may be given, for messages.
      skipped: names of folders that are left out.

    Raises:
      FileNotFoundError: no such path, or a link in the folder leads nowhere.
      ValueError: a file of another kind, or a name that is not UTF-8.
    """
    told, root = f"{field} = {source!r}", pathlib.Path(source).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{told}: no such file or folder; give one that exists{otherwise}")
    if root.is_dir():
        return [(root / name, name) for name in _files_below(root, suffixes, told, skipped)]
    if not root.name.lower().endswith(suffixes):
        raise ValueError(f"{told}: a file must end in {', '.join(suffixes)}")
    return [(root, root.name)]


def _path_documents(cfg: TextConfig, left_out: Counter[str]) -> Iterator[Document]:
    files = source_files(cfg.source)
    if pathlib.Path(cfg.source).expanduser().is_file():
        yield from readers.read_lone_file(files[0][0], cfg.field, left_out)
        return
    for path, name in files:
        yield from readers.read_file(path, name, cfg.field, left_out)


def _hub_documents(cfg: TextConfig, left_out: Counter[str]) -> Iterator[Document]:
    rows = readers.hub_rows(cfg.source, cfg.name, cfg.split, cfg.revision, cfg.field, "Text.field")
    prefix = "/".join(filter(None, (cfg.source.removeprefix(HUB), cfg.name, cfg.split)))
    for number, text in enumerate(rows):
        if not isinstance(text, str | None):
            raise ValueError(
                f"Text.source = {cfg.source!r}, row {number}: column {cfg.field!r} (Text.field) "
                f"holds {type(text).__name__}, not strings"
            )
        if text is not None and text.strip():
            yield Document(f"{prefix}:{number}", text)
        else:
            left_out[EMPTY] += 1
