"""One file of text, or one streamed dataset, to documents: lazily, and never a byte guessed at."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

TEXT_SUFFIXES = (".txt", ".py", ".md")
LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*TEXT_SUFFIXES, *LINES_SUFFIXES, ".parquet")
HUB = "hf:"
EMPTY = "empty_documents"
_BLOCK = 1 << 16  # characters
_LONG = 4  # blocks; a longer line is cut, so that a text of one line can be split, too
_SPACE = re.compile(r"\s")
_WHOLE = 64 << 20  # bytes; a larger text file is cut into documents, so that it need not fit
_CHUNK = 1 << 20
_PARQUET_ROWS = 256
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` writes


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its name: a relative path, with `:line`, `:row` or `:block` in a file of many."""

    name: str
    text: str


def extra(module: str, needed_for: str, package: str = "", group: str = "text") -> Any:
    """Imports an optional package.

    Args:
      module: what is imported.
      needed_for: begins the message.
      package: what is installed, where it is not called as the module is.
      group: the extra of ours that brings it.

    Raises:
      ValueError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name != top:
            raise
        package = package or top
        raise ValueError(
            f"{needed_for} needs the package {package}: pip install {package} (or saejax[{group}])"
        ) from error


def read_file(
    path: pathlib.Path, name: str, field: str, left_out: Counter[str]
) -> Iterator[Document]:
    """Documents of one file in their order; those without text are counted in `left_out`.

    A text file is one document; above 64 MiB it is cut as by `blocks`. A .jsonl file has one a
    line, named `name:line` from 1; a .parquet file one a row, named `name:row` from 0.

    Args:
      path: the file.
      name: what its documents are called.
      field: field or column with the text.
      left_out: counts documents whose text is empty, blank or null.

    Raises:
      ValueError: not UTF-8, NUL bytes, not JSON, no such field, truncated or damaged.
    """
    kind = path.name.lower()
    if kind.endswith(".parquet"):
        texts = enumerate(_parquet(path, field))
    elif kind.endswith(LINES_SUFFIXES):
        texts = _json_lines(path, field)
    elif path.stat().st_size > _WHOLE:
        yield from blocks(name, _decoded(path))
        return
    else:
        text = "".join(_decoded(path))
        if text.strip():
            yield Document(name, text)
        else:
            left_out[EMPTY] += 1
        return
    for number, text in texts:
        if text is not None and text.strip():
            yield Document(f"{name}:{number}", text)
        else:
            left_out[EMPTY] += 1


def read_lone_file(path: pathlib.Path, field: str, left_out: Counter[str]) -> Iterator[Document]:
    """As `read_file`; if the file holds but one document, in `blocks`, so that it can be split."""
    documents = read_file(path, path.name, field, left_out)
    first, second = next(documents, None), next(documents, None)
    if second is not None:
        yield from (first, second)
        yield from documents
    elif first is not None:
        yield from blocks(first.name, iter([first.text]), len(first.text))


def blocks(name: str, parts: Iterator[str], length: int | None = None) -> Iterator[Document]:
    """Cuts a text at line ends into `name:0`, `name:1` ... of 64 Ki characters or a little more.

    A line of more than four blocks is cut at white space, or after four where there is none.

    Args:
      name: of the text.
      parts: the text, in pieces.
      length: its length if that is known; a short one is cut into smaller blocks, about 20.
    """
    size = _BLOCK if length is None else max(1, min(_BLOCK, length // 20))
    lines, filled, number, pending = [], 0, 0, ""
    for part in parts:
        pieces = (pending + part).splitlines(keepends=True)
        last = pieces.pop() if pieces else ""  # the next part may continue its line
        *begun, pending = _cut(last, size)
        whole = [piece for line in pieces for piece in _cut(line, size)]
        for piece in [*whole, *begun]:
            lines.append(piece)
            filled += len(piece)
            if filled >= size:
                yield Document(f"{name}:{number}", "".join(lines))
                lines, filled, number = [], 0, number + 1
    if "".join([*lines, pending]).strip():
        yield Document(f"{name}:{number}", "".join([*lines, pending]))


def _cut(line: str, size: int) -> list[str]:
    """A line in pieces; those before the last are the same however much of it is there."""
    pieces, start = [], 0
    while len(line) - start > _LONG * size:
        found = _SPACE.search(line, start + size - 1, start + _LONG * size)
        end = found.end() if found else start + _LONG * size
        pieces.append(line[start:end])
        start = end
    return [*pieces, line[start:]]


def _decoded(path: pathlib.Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces, without byte order mark, newlines as one character."""
    rest, start = b"", 0
    with open(path, "rb") as file:
        while raw := file.read(8 * _CHUNK):
            raw = rest + raw
            last = len(raw) - start_of_rest(raw)
            text = _utf8(raw[:last], path, start)
            yield (text.removeprefix("\ufeff") if not start else text).replace("\r\n", "\n")
            rest, start = raw[last:], start + last
    if rest:
        yield _utf8(rest, path, start)


def start_of_rest(raw: bytes) -> int:
    """How many bytes at the end may belong to a character, or a line end, that goes on."""
    if raw.endswith(b"\r"):
        return 1
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if length > back else 0
    return 0


def _utf8(raw: bytes, path: str | os.PathLike[str], start: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at byte offset "
            f"{start + error.start}; convert it (for example `iconv -f latin1 -t utf-8`) or move "
            "it away"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{path} is binary, not text: NUL byte at byte offset {start + raw.index(0)}; convert "
            "it (UTF-16 with `iconv -f utf-16 -t utf-8`) or move it away"
        )
    return text


def _json_lines(path: pathlib.Path, field: str) -> Iterator[tuple[int, str | None]]:
    start = 0
    for number, raw in enumerate(_lines(_chunks(path)), 1):
        line = _utf8(raw, f"{path}, line {number}", start)
        start += len(raw) + 1
        line = line.removeprefix("\ufeff") if number == 1 else line
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = "not JSON" if isinstance(error, ValueError) else "too deeply nested JSON"
            raise ValueError(
                f"{path}, line {number} is {what}: {error}; mend or remove the line"
            ) from error
        if not isinstance(value, dict) or not isinstance(value.get(field, 0), str | None):
            found = f"; fields: {', '.join(map(str, value))}" if isinstance(value, dict) else ""
            raise ValueError(
                f"{path}, line {number}: each line must be an object with a string field "
                f'"{field}" (Text.field){found}'
            )
        yield number, value[field]


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that goes on
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        if others:
            yield b"".join(parts)
            yield from others[:-1]
            parts = [others[-1]]
    yield b"".join(parts)


def _chunks(path: pathlib.Path) -> Iterator[bytes]:
    """Bytes of a file, decompressed as its name says."""
    decompressor = _decompressor(path)
    with open(path, "rb") as file:
        if decompressor is None:
            while raw := file.read(_CHUNK):
                yield raw
            return
        make, failure = decompressor
        member = None
        if not os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is empty, which no compressed file is; fetch it again")
        while raw := file.read(_CHUNK):
            while raw:
                member = member or make()
                try:
                    yield member.decompress(raw)
                except failure as error:
                    raise ValueError(
                        f"{path} is damaged or not what its name says: {error}; fetch it again"
                    ) from error
                raw = b""
                if member.eof:  # another member (gzip) or frame (zstd) may follow
                    raw, member = member.unused_data.lstrip(b"\0"), None
        if member is not None:
            raise ValueError(
                f"{path} is truncated: it ends inside a compressed part; fetch it again"
            )


def _decompressor(path: pathlib.Path) -> tuple[Callable[[], Any], type[Exception]] | None:
    kind = path.suffix.lower()
    if kind == ".gz":
        return functools.partial(zlib.decompressobj, 31), zlib.error
    if kind == ".zst":
        zstandard = extra("zstandard", f"{path}: .zst")
        context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        return context.decompressobj, zstandard.ZstdError
    return None


def _parquet(path: pathlib.Path, field: str) -> Iterator[str | None]:
    for column in parquet_column(path, field, "Text.field"):
        if not _holds_strings(column.type):
            raise ValueError(
                f"{path}: column {field!r} (Text.field) holds {column.type}, not strings"
            )
        yield from column.to_pylist()


def _holds_strings(kind: Any) -> bool:
    import pyarrow

    if isinstance(kind, pyarrow.DictionaryType):  # as of what pandas calls a category
        kind = kind.value_type
    return kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


# numpy parses a header as a Python literal, and Python 3.11 counts the depth of that for all
# threads together: where garbage is collected meanwhile and another thread parses, a SystemError
# follows (python/cpython#106905).
_HEADERS = threading.Lock()


def open_npy(path: pathlib.Path) -> np.ndarray:
    """The memory-mapped array of a .npy file; nothing in it is unpickled. Threads may call it.

    Raises:
      ValueError: damaged, an array of objects, or an archive of several.
    """
    try:
        with _HEADERS:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no sound .npy array: {error}; make it again") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays, not one .npy array")
    return array


def parquet_column(path: pathlib.Path, field: str, setting: str) -> Iterator[Any]:
    """One column of a .parquet file as arrow arrays, a few hundred rows at a time.

    Raises:
      ValueError: pyarrow is missing, no such column (the existing ones are listed), damaged.
    """
    pyarrow = extra("pyarrow", f"{path}: .parquet")
    parquet = extra("pyarrow.parquet", f"{path}: .parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise NoColumnError(
                    f"{path} has no column {field!r} ({setting}); it has {', '.join(names)}"
                )
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[field]):
                yield batch.column(0)
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is no sound parquet file: {first}; fetch it again") from error


class NoColumnError(ValueError):
    """The file or dataset has no column of that name."""


def hub_rows(
    source: str, config: str | None, split: str, revision: str | None, field: str, setting: str
) -> Iterator[Any]:
    """Values of one column of a Hugging Face dataset (or a local folder of one), streamed.

    No code of the dataset is ever run: scripts are refused by the `datasets` library.

    Raises:
      ValueError: `datasets` is missing, or no such configuration, split or column.
      FileNotFoundError: no such dataset, or it cannot be reached.
    """
    datasets = extra("datasets", f"{setting.partition('.')[0]}.source = {source!r}")
    told = f"{setting.partition('.')[0]}.source = {source!r}"
    try:
        rows = datasets.load_dataset(
            source.removeprefix(HUB), config, split=split, revision=revision, streaming=True
        )
        names = rows.column_names or list(next(iter(rows), {field: None}))
        if field not in names:
            raise NoColumnError(
                f"{told} has no column {field!r} ({setting}); it has {', '.join(names)}"
            )
        for row in rows.select_columns([field]):
            yield row[field]
    except NoColumnError:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"{told}: {_first_line(error)}; check the name, the network, and `hf auth login` if "
            "it is gated"
        ) from error
    except Exception as error:  # of the many libraries below `datasets`; told, never passed over
        raise ValueError(f"{told}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
