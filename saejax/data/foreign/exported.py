"""Stores that `data.exporting` has written out, read back: `index.json` and safetensors files.

In text order the contexts come back whole, with their tokens, documents and masks. In stored order
the rows of a context are scattered, so each row is read as a context of its own.
"""

import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from saejax.data.foreign import tensors
from saejax.data.foreign.interface import BFLOAT16, Block, Foreign, Part, Wanted, pieces, read_json
from saejax.data.layout import MASKED

FORMAT = "saejax-export-1"
INDEX, DOCUMENTS = "index.json", "documents.json"
ROW_COLUMNS = ("activations", "tokens", "context", "document", "offset", "position")
CONTEXT_COLUMNS = ("context", "document", "offset", "rows", "tokens")
_SPECIAL = MASKED.index("special")
_KNOWN = ("subject", "subject_fingerprint", "site", "first_position", "compute_dtype")


def matches(path: pathlib.Path) -> bool:
    """A folder with the index of an export."""
    return (path / INDEX).is_file() and read_json(path / INDEX).get("format") == FORMAT


def read(path: pathlib.Path, wanted: Wanted) -> Foreign:
    """Everything in the folder."""
    if wanted.field is not None or wanted.tokens is not None:
        raise ValueError(
            f"{path} is an export of saejax, whose fields are known; leave out --field"
        )
    index = read_json(path / INDEX)
    spec = index["spec"]
    rows = _Files(path, index["files"], ROW_COLUMNS)
    names = read_json(path / DOCUMENTS)["names"]
    known = {key: spec[key] for key in _KNOWN}
    known["lead"] = index["provenance"].get("lead", 0)
    if index["order"] == "text":
        contexts = _Files(path, index["context_files"], CONTEXT_COLUMNS)
        parts: tuple[Part, ...] = (_contexts_part(path, index, rows, contexts),)
    else:
        known["first_position"] = known["lead"] = 0  # each row tells its own offset
        parts = tuple(_rows_part(rows, i, index) for i in range(len(rows)))
    return Foreign(parts=parts, filtered=True, known=known, documents=tuple(names))


class _Files:
    """Columns that go on from file to file."""

    def __init__(
        self, folder: pathlib.Path, listed: Sequence[Mapping[str, Any]], columns: Sequence[str]
    ) -> None:
        self.paths = [folder / entry["name"] for entry in listed]
        self.counts = [entry["rows"] for entry in listed]
        self.bounds = np.cumsum([0, *self.counts])
        self.count = int(self.bounds[-1])
        for i, path in enumerate(self.paths):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, and {INDEX} lists it")
            found = self.open(i)
            missing = [name for name in columns if not isinstance(found.get(name), np.ndarray)]
            if missing:
                raise ValueError(f"{path} has no tensor {missing[0]!r}")
            if any(len(found[name]) != self.counts[i] for name in columns):
                raise ValueError(f"{path} does not hold the {self.counts[i]} rows of {INDEX}")

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, i: int) -> Mapping[str, np.ndarray]:
        return tensors.open_tensors(self.paths[i])

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> list[np.ndarray]:
        """Some rows, ascending."""
        cuts = np.searchsorted(rows, self.bounds)
        found: list[list[np.ndarray]] = [[] for _ in columns]
        for i, (low, high) in enumerate(itertools.pairwise(cuts)):
            if low < high:
                arrays = self.open(i)
                for parts, name in zip(found, columns, strict=True):
                    parts.append(arrays[name][rows[low:high] - self.bounds[i]])
        return [np.concatenate(parts) for parts in found]

    def whole(self, column: str) -> np.ndarray:
        return np.concatenate([np.asarray(self.open(i)[column]) for i in range(len(self))])


def _contexts_part(
    path: pathlib.Path, index: Mapping[str, Any], rows: _Files, contexts: _Files
) -> Part:
    spec, has_tokens = index["spec"], index["has_tokens"]
    starts = np.cumsum([0, *contexts.whole("rows")])
    if starts[-1] != rows.count:
        raise ValueError(f"{path}: {rows.count} rows, but its contexts have {starts[-1]}")
    shape = (contexts.count, spec["context_length"], spec["d_model"])

    def blocks(wanted: np.ndarray) -> Iterator[Block]:
        for some in pieces(wanted, shape):
            *origin, tokens = contexts.take(some, ["context", "document", "offset", "tokens"])
            count = starts[some + 1] - starts[some]
            local = np.repeat(np.arange(len(some)), count)
            at = np.arange(count.sum()) + np.repeat(starts[some] - np.cumsum(count) + count, count)
            acts = np.zeros((len(some), *shape[1:]), BFLOAT16)
            masked = np.full(acts.shape[:2], _SPECIAL, np.uint8)
            if len(at):
                values, context, position = rows.take(at, ["activations", "context", "position"])
                if (context != origin[0][local]).any():
                    raise ValueError(f"{path}: its rows and its contexts do not fit each other")
                acts[local, position], masked[local, position] = values, 0
            yield Block(
                acts=acts,
                tokens=tokens if has_tokens else None,
                masked=masked,
                origin=np.stack(origin, axis=1),
            )

    return Part(
        path=path / INDEX,
        name=path.name,
        shape=shape,
        dtype="bfloat16",
        field="activations",
        tokens=has_tokens,
        read=blocks,
        files=(path / INDEX, *rows.paths, *contexts.paths),
    )


def _rows_part(rows: _Files, i: int, index: Mapping[str, Any]) -> Part:
    shape, first = (rows.counts[i], 1, index["spec"]["d_model"]), int(rows.bounds[i])

    def blocks(wanted: np.ndarray) -> Iterator[Block]:
        for some in pieces(wanted, shape):
            names = ["activations", "tokens", "document", "offset"]
            acts, tokens, document, offset = (rows.open(i)[name][some] for name in names)
            yield Block(
                acts=acts[:, None],
                tokens=tokens[:, None] if index["has_tokens"] else None,
                origin=np.stack([first + some, document, offset], axis=1),
            )

    path = rows.paths[i]
    return Part(
        path=path,
        name=path.name,
        shape=shape,
        dtype="bfloat16",
        field="activations",
        tokens=index["has_tokens"],
        read=blocks,
    )
