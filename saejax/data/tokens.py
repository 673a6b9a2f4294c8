"""Documents to rows of tokens of one length, with their provenance."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from saejax.data.bpe import Tokenizer
from saejax.data.corpus import Document


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Rows of tokens cut from documents; no row crosses a document.

    Attributes:
      tokens: [N, T] uint16, or uint32 for a vocabulary above 65,536.
      document: [N] int32, index into `names`.
      offset: [N] int32, position of the row's first token in its document's token sequence.
      names: names of all documents, also of those too short to give a row.
      dropped_tokens: tokens in tails (and whole documents) shorter than T.
      fingerprint: first 16 hex digits of a sha256 of tokens, names and tokenizer.
      bytes_total: bytes of text that the kept tokens stand for; `<|endoftext|>` counts none.
    """

    tokens: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    names: tuple[str, ...]
    dropped_tokens: int
    fingerprint: str
    bytes_total: int


def pack(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    context_length: int,
    add_eot: bool = True,
) -> Contexts:
    """Tokenises documents and cuts each into rows of `context_length`; tails are dropped.

    Args:
      documents: texts, in order.
      tokenizer: gives ids; its `eot_id` is placed before each document when `add_eot`.
      context_length: T, at least 2.
      add_eot: whether each document starts with `<|endoftext|>`.

    Raises:
      ValueError: context_length under 2, or every document is shorter than it.
    """
    if context_length < 2:
        raise ValueError(f"context_length = {context_length}: at least 2 tokens are needed")
    rows, owners, offsets, dropped = [], [], [], 0
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for index, document in enumerate(documents):
        ids = [tokenizer.eot_id] * add_eot + tokenizer.encode(document.text)
        n_rows = len(ids) // context_length
        kept = n_rows * context_length
        dropped += len(ids) - kept
        rows.append(np.array(ids[:kept], dtype).reshape(n_rows, context_length))
        owners.append(np.full(n_rows, index, np.int32))
        offsets.append(np.arange(n_rows, dtype=np.int32) * context_length)
    if not sum(map(len, rows)):
        raise ValueError(
            f"context_length = {context_length}: none of the {len(documents)} documents has that "
            "many tokens; give more text or a shorter context"
        )
    tokens = np.concatenate(rows)
    names = tuple(document.name for document in documents)
    digest = hashlib.sha256(tokens.astype("<u4").tobytes())
    digest.update("\0".join([tokenizer.fingerprint, str(tokens.shape), *names]).encode())
    return Contexts(
        tokens=tokens,
        document=np.concatenate(owners),
        offset=np.concatenate(offsets),
        names=names,
        dropped_tokens=dropped,
        fingerprint=digest.hexdigest()[:16],
        bytes_total=int(byte_lengths(tokenizer)[tokens].sum()),
    )


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """[V] int64: bytes of text each id stands for, 0 for `<|endoftext|>` and for unused ids."""
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    for token in tokenizer.ids():
        lengths[token] = len(tokenizer.token_bytes(token))
    lengths[tokenizer.eot_id] = 0
    return lengths
