"""Documents to rows of tokens of one length, with their provenance."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from saejax.data.corpus import Bos, Tails
from saejax.data.readers import Document

MIN_TAIL = 16
SHORT = "documents_without_a_row"
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 22
_FLUSH_TOKENS = 1 << 20


class Tokenizer(Protocol):
    """What packing and the viewer need of a tokenizer; see `bpe.py` and `tokenizers.py`.

    Attributes:
      vocab_size: one more than the largest id.
      eot_id: id that ends a text; rows are padded with it.
      bos_id: id that starts a text, or None.
      default_bos: where `bos='auto'` puts it: 'none', 'document' or 'context'.
      special_ids: ids that stand for no text.
      byte_exact: whether the bytes of a text's tokens are those of the text.
      fingerprint: of vocabulary, rules and special ids.
    """

    vocab_size: int
    eot_id: int
    bos_id: int | None
    default_bos: str
    special_ids: frozenset[int]
    byte_exact: bool
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ones."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special ones."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""

    def ids(self) -> list[int]:
        """All ids, ascending."""

    def token_bytes(self, token: int) -> bytes:
        """Bytes that an id stands for."""

    def token_text(self, token: int) -> str:
        """One id for display."""


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Rows of tokens cut from documents; no row crosses a document.

    Token p of row i, p >= lead, is token `offset[i] + p - lead` of document `document[i]`; the
    `lead` tokens before it (0, or 1 with bos='context') belong to no document.

    Attributes:
      tokens: [N, T] uint16, or uint32 for a vocabulary above 65,536.
      document: [N] int32, index into `names`.
      offset: [N] int32, position of the row's first token in its document's token sequence (a
        token put before the document counts, one put before each row does not).
      names: names of all documents, also of those too short to give a row.
      dropped_tokens: tokens in tails (and whole documents) that gave no row.
      fingerprint: first 16 hex digits of a sha256 of tokens, names and tokenizer (and of `length`
        where rows are padded, and of whether special tokens are kept).
      bytes_total: bytes of text that the kept tokens stand for; special tokens count none.
      keep: [N, T] bool, where an activation may be stored: False for special tokens (BOS among
        them; unless they are kept) and padding.
      length: [N] int32, tokens of the row; what follows is padding.
      lead: tokens before the document's own in each row.
      byte_start: [N] int64, byte of the document's UTF-8 text at which the row begins; -1 where
        the tokenizer rewrites text, and for documents that came as tokens.
      document_bytes: [len(names)] int64, bytes of the documents' texts; -1 where they came as
        tokens.
      document_sha256: [len(names), 32] uint8, of the documents' texts (of their ids, as little
        endian uint32, where they came as tokens).
      left_out: counts of what was left out by rule, by reason.
    """

    tokens: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    names: tuple[str, ...]
    dropped_tokens: int
    fingerprint: str
    bytes_total: int
    keep: np.ndarray
    length: np.ndarray
    lead: int
    byte_start: np.ndarray
    document_bytes: np.ndarray
    document_sha256: np.ndarray
    left_out: dict[str, int]


@dataclasses.dataclass(frozen=True)
class TokenDocument:
    """One document as ids; `n_bytes` is -1 when it never was text here."""

    name: str
    ids: np.ndarray
    n_bytes: int
    sha256: bytes


class Sink(Protocol):
    """Where rows go while documents are read: memory, or files."""

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Takes some more rows of every column."""

    def finish(self) -> dict[str, np.ndarray]:
        """Every column whole."""


class MemorySink:
    """Keeps rows in memory, in numpy arrays of the final type."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}

    def append(self, columns: dict[str, np.ndarray]) -> None:
        """Takes some more rows of every column."""
        for name, part in columns.items():
            self._parts.setdefault(name, []).append(part)

    def finish(self) -> dict[str, np.ndarray]:
        """Every column whole; the parts are let go one column at a time."""
        return {name: np.concatenate(self._parts.pop(name)) for name in list(self._parts)}


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    context_length: int,
    *,
    bos: Bos = "auto",
    tails: Tails = "drop",
    min_tail: int = MIN_TAIL,
    sink: Sink | None = None,
) -> Contexts:
    """Tokenises documents and cuts each into rows of `context_length`.

    Args:
      documents: texts, in order; read once, a batch at a time. A `left_out` attribute, as that of
        `corpus.Documents`, is copied into the result.
      tokenizer: gives ids.
      context_length: T, at least 2.
      bos: where the tokenizer's `bos_id` is put; see `TextConfig`.
      tails: whether the rest of a document after its last full row is dropped, or padded to a row.
      min_tail: shortest rest that is padded, in tokens of the document.
      sink: where rows are collected; memory by default.

    Raises:
      ValueError: context_length under 2, no document gives a row, no BOS in the tokenizer, a
        min_tail that no tail reaches, or a text with a lone surrogate.
    """
    encoded = encode_documents(documents, tokenizer)
    packed = pack_tokens(
        encoded, tokenizer, context_length, bos=bos, tails=tails, min_tail=min_tail, sink=sink
    )
    packed.left_out.update(getattr(documents, "left_out", {}))
    return packed


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[TokenDocument]:
    """Texts to ids, some megabytes of text at a time.

    Raises:
      ValueError: a text holds a lone surrogate; names the document.
    """
    dtype = token_dtype(tokenizer)
    batch: list[tuple[str, str, int, bytes]] = []
    characters = 0

    def encoded() -> Iterator[TokenDocument]:
        ids = tokenizer.encode_batch([text for _, text, _, _ in batch])
        for (name, _, n_bytes, digest), row in zip(batch, ids, strict=True):
            yield TokenDocument(name, np.array(row, dtype), n_bytes, digest)

    for document in documents:
        try:
            raw = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{document.name}: character {error.start} is a lone surrogate "
                f"({document.text[error.start]!r}), which is no text; mend or remove the document"
            ) from error
        batch.append((document.name, document.text, len(raw), hashlib.sha256(raw).digest()))
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield from encoded()
            batch.clear()
            characters = 0
    yield from encoded()


def pack_tokens(
    documents: Iterable[TokenDocument],
    tokenizer: Tokenizer,
    context_length: int,
    *,
    bos: Bos = "auto",
    tails: Tails = "drop",
    min_tail: int = MIN_TAIL,
    keep_special: bool = False,
    sink: Sink | None = None,
) -> Contexts:
    """Cuts documents of ids into rows; see `pack`.

    With `keep_special`, `Contexts.keep` is False for padding alone.
    """
    packer = _Packer(tokenizer, context_length, bos, tails, min_tail, sink or MemorySink())
    packer.keeps_special = keep_special
    for document in documents:
        packer.add(document)
    return packer.finish()


def resolve_bos(tokenizer: Tokenizer, bos: Bos) -> Bos:
    """What `bos` means for a tokenizer: 'none', 'document' or 'context'.

    Raises:
      ValueError: it has no BOS to put anywhere.
    """
    resolved = tokenizer.default_bos if bos == "auto" else bos
    if resolved not in ("none", "document", "context"):
        raise ValueError(f"bos = {bos!r}: allowed are 'auto', 'none', 'document' and 'context'")
    if resolved != "none" and tokenizer.bos_id is None:
        raise ValueError(
            f"bos = {bos!r}: the tokenizer has no beginning-of-sequence token; set bos to 'none'"
        )
    return resolved


def token_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]]:
    """uint16 if it holds all ids, else uint32."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


class NoRowError(ValueError):
    """No document is long enough for a row."""


class _Packer:
    """Cuts one document after another; hands rows on in large parts."""

    def __init__(self, tokenizer, context_length, bos, tails, min_tail, sink):
        if context_length < 2:
            raise ValueError(f"context_length = {context_length}: at least 2 tokens are needed")
        if tails not in ("drop", "pad"):
            raise ValueError(f"tails = {tails!r}: allowed are 'drop' and 'pad'")
        self.bos = resolve_bos(tokenizer, bos)
        self.lead = int(self.bos == "context")
        self.room = context_length - self.lead
        if tails == "pad" and min_tail >= self.room:
            raise ValueError(
                f"min_tail = {min_tail}: with context_length = {context_length} tails are shorter "
                f"than {self.room} tokens, so none would be kept; give less, or tails = 'drop'"
            )
        self.tokenizer, self.length, self.sink = tokenizer, context_length, sink
        self.min_tail = min_tail if tails == "pad" else self.room
        self.dtype = token_dtype(tokenizer)
        self.byte_lengths = byte_lengths(tokenizer)
        self.special = np.zeros(tokenizer.vocab_size, bool)
        self.special[list(tokenizer.special_ids)] = True
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.hashes: list[bytes] = []
        self.left_out: Counter[str] = Counter()
        self.dropped = self.bytes_total = self.rows = self.waiting = 0
        self.padded = self.keeps_special = False
        self.parts: list[np.ndarray] = []
        self.cuts: list[tuple[int, int, int, bool]] = []  # document, rows, tokens in them, exact
        self.digest, self.lengths_digest = hashlib.sha256(), hashlib.sha256()

    def add(self, document: TokenDocument) -> None:
        ids = np.asarray(document.ids, self.dtype)
        if self.bos == "document":
            ids = np.concatenate([np.array([self.tokenizer.bos_id], self.dtype), ids])
        full, rest = divmod(len(ids), self.room)
        n_rows = full + (rest >= self.min_tail)
        kept = min(len(ids), n_rows * self.room)
        self.dropped += len(ids) - kept
        self.names.append(document.name)
        self.sizes.append(document.n_bytes)
        self.hashes.append(document.sha256)
        if not n_rows:
            self.left_out[SHORT] += 1
            return
        padding = np.full(n_rows * self.room - kept, self.tokenizer.eot_id, self.dtype)
        self.parts += [ids[:kept], padding] if len(padding) else [ids[:kept]]
        exact = self.tokenizer.byte_exact and document.n_bytes >= 0
        self.cuts.append((len(self.names) - 1, n_rows, kept, exact))
        self.waiting += kept
        if self.waiting >= _FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Hands on the rows of the documents since the last time."""
        body = np.concatenate(self.parts).reshape(-1, self.room)
        index, n_rows, kept, exact = np.array(self.cuts).T
        first = np.cumsum(n_rows) - n_rows
        of = np.repeat(np.arange(len(index)), n_rows)
        offset = (np.arange(len(body)) - first[of]) * self.room
        length = np.full(len(body), self.length)
        length[first + n_rows - 1] = kept - (n_rows - 1) * self.room + self.lead
        tokens = body
        if self.lead:
            lead = np.full((len(body), 1), self.tokenizer.bos_id, self.dtype)
            tokens = np.concatenate([lead, body], axis=1)
        keep = np.arange(self.length) < length[:, None]
        if not self.keeps_special:
            keep &= ~self.special[tokens]
        row_bytes = self.byte_lengths[body].sum(1)
        before = np.cumsum(row_bytes) - row_bytes
        self._emit(
            tokens=tokens,
            document=index[of].astype(np.int32),
            offset=offset.astype(np.int32),
            length=length.astype(np.int32),
            keep=keep,
            byte_start=np.where(exact[of] > 0, before - before[first[of]], -1),
        )
        self.bytes_total += int(row_bytes.sum())
        self.parts, self.cuts, self.waiting = [], [], 0

    def _emit(self, **columns: np.ndarray) -> None:
        tokens, length = columns["tokens"], columns["length"]
        self.digest.update(tokens.astype("<u4").tobytes())
        self.lengths_digest.update(length.astype("<u4").tobytes())
        self.padded |= bool((length < self.length).any())
        self.rows += len(tokens)
        self.sink.append(columns)

    def finish(self) -> Contexts:
        if self.parts:
            self.flush()
        if not self.rows:
            none = f"none of the {len(self.names)} documents has that many tokens"
            if self.min_tail < self.room:
                raise NoRowError(
                    f"min_tail = {self.min_tail}: {none}, the fewest that tails = 'pad' keeps; "
                    "give longer documents, or a smaller min_tail"
                )
            raise NoRowError(
                f"context_length = {self.length}: {none}; give more text or a shorter context"
            )
        shape = str((self.rows, self.length))
        self.digest.update("\0".join([self.tokenizer.fingerprint, shape, *self.names]).encode())
        if self.padded:
            self.digest.update(self.lengths_digest.digest())
        if self.keeps_special:
            self.digest.update(b"special tokens are kept")
        return Contexts(
            **self.sink.finish(),
            names=tuple(self.names),
            dropped_tokens=self.dropped,
            fingerprint=self.digest.hexdigest()[:16],
            bytes_total=self.bytes_total,
            lead=self.lead,
            document_bytes=np.array(self.sizes, np.int64),
            document_sha256=np.frombuffer(b"".join(self.hashes), np.uint8).reshape(-1, 32),
            left_out=dict(self.left_out),
        )


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """[V] int64: bytes of text each id stands for, 0 for special and for unused ids."""
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    for token in tokenizer.ids():
        lengths[token] = len(tokenizer.token_bytes(token))
    lengths[[*tokenizer.special_ids, tokenizer.eot_id]] = 0
    return lengths
