"""Token ids made elsewhere: .npy, safetensors, parquet and Hugging Face datasets."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from saejax.data import readers, splits
from saejax.data.corpus import Bos, Tails
from saejax.data.id_files import (
    SUFFIXES,
    IdArray,
    list_of_ids,
    open_ids,
    parquet_blocks,
    token_files,
)
from saejax.data.progress import Progress
from saejax.data.readers import EMPTY, HUB
from saejax.data.splits import Split
from saejax.data.tokens import TokenDocument, Tokenizer, resolve_bos

_BLOCK_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Token ids made elsewhere: where they are, how they are split and cut into contexts.

    Attributes:
      source: path of a .npy, .safetensors or .parquet file or of a folder of such, or
        'hf:owner/name', a dataset of the Hugging Face hub (parquet and 'hf:' need the packages
        pyarrow and datasets). Each row of a matrix [N, T], and each list of a table, is a document.
      field: tensor of a .safetensors file, or column of a table, that holds the ids.
      offsets: of a flat array, where its documents begin, ascending from 0: another .npy file, or
        another tensor of the same .safetensors file.
      separator: of a flat array without offsets, the id that begins every document; a file without
        it, among others that have it, is one document. Of a subject without a tokenizer it is taken
        to be a special token, as the ids are that its config.json names: bos_token_id, eos_token_id
        and pad_token_id.
      pad_id: id that fills rows up on their right; it is cut off, and may lie outside the
        vocabulary, as -1 or -100 do. None: rows are full.
      name: configuration ("subset") of the Hugging Face dataset.
      split: its split; both of ours are cut out of this one.
      revision: its branch, tag or commit.
      held_out_percent: share of the documents held out, chosen by the sha256 of `file:number`.
      max_tokens: at most so many tokens in each split. None takes all.
      max_documents: at most so many documents in each split.
      take: which documents a limit takes; see `TextConfig`.
      bos: where a beginning-of-sequence token is put; 'none' where the ids have theirs already.
      tails: what is left of a document after its last full context: 'drop' or 'pad'.
      min_tail: shortest tail that is padded, in tokens.
      cache: folder in which contexts are kept for the next run; None keeps nothing.
    """

    source: str
    field: str = "input_ids"
    offsets: str | None = None
    separator: int | None = None
    pad_id: int | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    held_out_percent: float = 5.0
    max_tokens: int | None = None
    max_documents: int | None = None
    take: Literal["auto", "sample", "first"] = "auto"
    bos: Bos = "none"
    tails: Tails = "drop"
    min_tail: int = 16
    cache: str | None = None

    def __post_init__(self):
        for field in ("source", "field", "split"):
            if not getattr(self, field):
                raise ValueError(f"Tokens.{field} is empty: give a name")
        splits.check(self, "Tokens", "max_tokens", "max_documents")
        if self.separator is not None and self.separator < 0:
            raise ValueError(f"Tokens.separator = {self.separator}: give an id, 0 or more, or None")
        if self.offsets is not None and self.separator is not None:
            raise ValueError("Tokens.offsets and Tokens.separator say the same; give one of them")


class IdsOnly:
    """Stands in for a tokenizer where there is none: the size of the vocabulary, and special ids.

    No text can be encoded, and no bytes are known; a token reads as `[id]`.
    """

    default_bos, byte_exact = "none", False

    def __init__(
        self,
        vocab_size: int,
        *,
        bos: int | None = None,
        eos: Iterable[int] = (),
        special: Iterable[int] = (),
    ):
        """Takes the number of ids, 0 to vocab_size - 1, and which of them are known to be special.

        Args:
          vocab_size: number of ids.
          bos: begins a text.
          eos: end a text; rows are padded with the first, or with 0.
          special: further ids that stand for no text.
        """
        inside = [i for i in eos if 0 <= i < vocab_size]
        self.vocab_size, self.max_id = vocab_size, vocab_size - 1
        self.bos_id = bos if bos is not None and 0 <= bos < vocab_size else None
        self.eot_id = inside[0] if inside else 0
        known = {*inside, *special, *(() if bos is None else (bos,))}
        self.special_ids = frozenset(i for i in known if 0 <= i < vocab_size)
        self.fingerprint = f"ids below {vocab_size}"
        if self.special_ids:
            self.fingerprint += f", special {sorted(self.special_ids)}"

    def with_special(self, *ids: int | None) -> IdsOnly:
        """The same with further special ids; None is none."""
        more = {i for i in ids if i is not None}
        eos = (self.eot_id,) if self.eot_id in self.special_ids else ()
        return IdsOnly(self.vocab_size, bos=self.bos_id, eos=eos, special=self.special_ids | more)

    def encode(self, text: str) -> list[int]:
        """Refuses.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "text cannot be encoded without a tokenizer: give a model folder with tokenizer.json"
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Refuses any text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """`[id]` for each."""
        return "".join(map(self.token_text, ids))

    def ids(self) -> list[int]:
        """All ids, ascending."""
        return list(range(self.vocab_size))

    def token_bytes(self, token: int) -> bytes:
        """None are known."""
        return b""

    def token_text(self, token: int) -> str:
        """`[id]`."""
        return f"[{int(token)}]"


class TokenDocuments(splits.SplitReader):
    """The documents of one split of a source of ids; see `splits.SplitReader`."""

    def __init__(
        self,
        cfg: TokensConfig,
        split: Split,
        tokenizer: Tokenizer,
        progress: Progress | None = None,
    ):
        """Reads nothing yet; `progress` is told of every document that is read.

        Raises:
          ValueError: no such split, or a separator outside the vocabulary.
        """
        super().__init__(cfg, split, label="Tokens", limit="max_tokens")
        if cfg.separator is not None and cfg.separator >= tokenizer.vocab_size:
            raise ValueError(
                f"Tokens.separator = {cfg.separator} is outside the tokenizer's vocabulary (0 .. "
                f"{tokenizer.vocab_size - 1}); give the id that begins every document"
            )
        self._separated = False  # whether the separator was seen
        self._progress = progress or Progress(None, "")
        self.first = cfg.take == "first" or (cfg.take == "auto" and cfg.source.startswith(HUB))
        self._vocab_size = tokenizer.vocab_size
        self._begins = None if resolve_bos(tokenizer, cfg.bos) == "none" else tokenizer.bos_id

    def read(self, left_out: Counter[str]) -> Iterator[TokenDocument]:
        """All documents of both splits, by file name and inside a file as they stand."""
        for name, ids in self._progress.reading(self._named()):
            if self.cfg.pad_id is not None:
                real = np.flatnonzero(ids != self.cfg.pad_id)
                ids = ids[: real[-1] + 1 if len(real) else 0]
                if not 0 <= self.cfg.pad_id < self._vocab_size and len(real) < len(ids):
                    raise ValueError(
                        f"{name}: Tokens.pad_id = {self.cfg.pad_id} stands before other ids, and "
                        "is outside the tokenizer's vocabulary; pad rows on their right"
                    )
            if not len(ids):
                left_out[EMPTY] += 1
                continue
            if self._begins is not None and ids[0] == self._begins:
                raise ValueError(
                    f"{name} begins with the BOS token {self._begins} already, and Tokens.bos = "
                    f"{self.cfg.bos!r} would put another before it; set Tokens.bos = 'none'"
                )
            digest = hashlib.sha256(ids.astype("<u4").tobytes()).digest()
            yield TokenDocument(name, ids, -1, digest)

    def size(self, document: TokenDocument) -> int:
        """Tokens."""
        return len(document.ids)

    def nothing(self) -> str:
        """What to do when there are no ids at all."""
        return f"holds no tokens: give a file, or a folder, with {', '.join(SUFFIXES)} files"

    def _named(self) -> Iterator[tuple[str, np.ndarray]]:
        cfg = self.cfg
        if cfg.source.startswith(HUB):
            prefix = "/".join(filter(None, (cfg.source.removeprefix(HUB), cfg.name, cfg.split)))
            rows = readers.hub_rows(
                cfg.source, cfg.name, cfg.split, cfg.revision, cfg.field, "Tokens.field"
            )
            for number, row in enumerate(rows):
                name = f"{prefix}:{number}"
                ids = list_of_ids(row, name)
                yield name, self._checked(ids, np.array([len(ids)]), prefix, number)
            return
        for path, name in self._files():
            number = 0
            for block, lengths in self._blocks(path):
                ids = self._checked(block, lengths, str(path), number)
                for row in np.split(ids, np.cumsum(lengths)[:-1]):
                    yield f"{name}:{number}", row
                    number += 1

    def _files(self) -> Iterator[tuple[pathlib.Path, str]]:
        """The files of ids; one of offsets may lie among them."""
        offsets = self.cfg.offsets
        beside = pathlib.Path(offsets).expanduser().resolve() if offsets else None
        for path, name in token_files(self.cfg.source):
            if beside is None or (name != offsets and path.resolve() != beside):
                yield path, name

    def _checked(self, ids: np.ndarray, lengths: np.ndarray, where: str, first: int) -> np.ndarray:
        """The flat ids of documents `first`, first + 1 ..., all of them in the vocabulary."""
        flat = self.cfg.offsets is not None or self.cfg.separator is not None
        kind = "document" if flat else "row"
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{where}, from {kind} {first}: ids of dtype {ids.dtype}, not integers; give token "
                "ids"
            )
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0 or high >= self._vocab_size:  # of padding, or wrong
            strange = (ids < 0) | (ids >= self._vocab_size)
            if self.cfg.pad_id is not None:
                strange &= ids != self.cfg.pad_id
            if not strange.any():
                return ids
            at = int(np.flatnonzero(strange)[0])
            wrong, ends = int(ids[at]), np.cumsum(lengths)
            row = int(np.searchsorted(ends, at, side="right"))
            remedy = "use ids of the subject's own tokenizer"
            if self.cfg.pad_id is None and (ids[strange] == wrong).all():
                remedy += f", or set Tokens.pad_id = {wrong} if it fills {kind}s up on the right"
            raise ValueError(
                f"{where}, {kind} {first + row}, token {at - int(ends[row] - lengths[row])}: id "
                f"{wrong} is outside the tokenizer's vocabulary (0 .. {self._vocab_size - 1}); "
                f"{remedy}"
            )
        return ids

    def _blocks(self, path: pathlib.Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Flat ids of whole documents and their lengths, about a million tokens at a time."""
        if path.suffix.lower() == ".parquet":
            yield from parquet_blocks(path, self.cfg.field)
            return
        array, beside = open_ids(path, self.cfg.field, self.cfg.offsets)
        if len(array.shape) == 2:
            n, width = array.shape
            step = max(1, _BLOCK_TOKENS // max(1, width))
            for start in range(0, n, step):
                block = array.read(start, min(n, start + step))
                yield block.reshape(-1), np.full(len(block), width)
            return
        starts = self._starts(path, array, beside)
        bounds = np.append(starts, array.shape[0])
        first = 0
        while first < len(starts):
            last = int(np.searchsorted(bounds, bounds[first] + _BLOCK_TOKENS, side="right")) - 1
            last = min(max(last, first + 1), len(starts))
            yield (
                array.read(int(bounds[first]), int(bounds[last])),
                np.diff(bounds[first : last + 1]),
            )
            first = last

    def _starts(self, path: pathlib.Path, array: IdArray, beside: IdArray | None) -> np.ndarray:
        """Where the documents of a flat array begin."""
        length = array.shape[0]
        if beside is not None:
            starts = np.asarray(beside.read(0, beside.shape[0]))
            if starts.ndim == 1 and len(starts) > 1 and starts[-1] == length:
                starts = starts[:-1]  # the end of the last document is given too
            sound = starts.ndim == 1 and len(starts) and np.issubdtype(starts.dtype, np.integer)
            starts = starts.astype(np.int64) if sound else starts
            if not sound or starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] >= length:
                raise ValueError(
                    f"Tokens.offsets = {self.cfg.offsets!r} must hold integers that ascend from 0 "
                    f"and end below {length}, the length of {path}"
                )
            return starts
        if self.cfg.separator is None:
            raise ValueError(
                f"{path} is a flat array of {length} ids: say where its documents begin with "
                "Tokens.offsets or Tokens.separator, or reshape it to [N, T]"
            )
        found = [start + at for start, at in self._separators(array)]
        if any(map(len, found)):
            self._separated = True
        elif length and not self._separated:
            self._look_for_separator()
        return np.unique(np.concatenate([np.zeros(1, np.int64), *found]))

    def _separators(self, array: IdArray) -> Iterator[tuple[int, np.ndarray]]:
        """Where parts of a flat array begin, and where in each the separator stands."""
        for start in range(0, array.shape[0], _BLOCK_TOKENS):
            block = array.read(start, min(array.shape[0], start + _BLOCK_TOKENS))
            yield start, np.flatnonzero(block == self.cfg.separator)

    def _look_for_separator(self) -> None:
        """Refuses flat arrays none of which has it: their documents would run into one another."""
        total = 0
        for path, _ in self._files():
            if path.suffix.lower() == ".parquet":
                continue
            array, _ = open_ids(path, self.cfg.field, None)
            if len(array.shape) == 1:
                total += array.shape[0]
                if any(len(at) for _, at in self._separators(array)):
                    self._separated = True
                    return
        raise ValueError(
            f"Tokens.separator = {self.cfg.separator} begins no document: it is 0 of {total} "
            f"tokens of Tokens.source = {self.cfg.source!r}, which would run into one another; "
            "give the id that begins each, or Tokens.offsets, or reshape the ids to [N, T]"
        )
