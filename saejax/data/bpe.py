"""Byte-level byte-pair encoding in plain Python: Hugging Face ``tokenizer.json`` in and out.

The pre-tokenizer has GPT-2's semantics (Radford et al. 2019, ``encoder.py``):
``'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+``
Merges are applied one at a time, lowest rank first and leftmost on ties, as the `tokenizers`
library does, so the ids are the same as that library's.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
import os
import pathlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

END_OF_TEXT = "<|endoftext|>"
# Unicode's White_Space property. Python's `\s` also has U+001C..U+001F, which it has not.
_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CACHE_ENTRIES = 1 << 19
_CACHED_PIECE = 256  # longer pieces are rare and would fill the cache


def _pattern(letters: str, numbers: str, spaces: str) -> re.Pattern[str]:
    return re.compile(
        f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+| ?[^{spaces}{letters}{numbers}]+"
        f"|[{spaces}]+(?![^{spaces}])|[{spaces}]+"
    )


def _ranges(wanted: str) -> str:
    """The body of a character class with every code point whose category starts with `wanted`."""
    parts, start = [], None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and unicodedata.category(chr(code))[0] == wanted
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            parts.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return "".join(parts)


@functools.cache
def _unicode_pattern() -> re.Pattern[str]:
    return _pattern(_ranges("L"), _ranges("N"), _WHITE_SPACE)  # about half a second, once


@functools.cache
def _ascii_pattern() -> re.Pattern[str]:
    return _pattern("A-Za-z", "0-9", "\t-\r ")


def split_pieces(text: str) -> list[str]:
    """Cuts text into GPT-2's pieces; their concatenation is the text."""
    return (_ascii_pattern() if text.isascii() else _unicode_pattern()).findall(text)


@functools.cache
def byte_symbols() -> tuple[str, ...]:
    """The printable character that stands for each byte in a vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(shifted)) for byte in range(256))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate {text[error.start]!r}, which UTF-8 cannot represent; "
            "decode the source with errors='replace', or remove the character"
        ) from error


class UnsupportedTokenizerError(ValueError):
    """The file is sound, and asks for something that is not implemented here."""


class Tokenizer:
    """A byte-level BPE tokenizer; ids are those of the `tokenizers` library.

    Special tokens that occur literally in a text are encoded as ordinary text: only
    `tokens.pack` places `<|endoftext|>`, at the start of a document. Truncation and padding
    settings of a file are ignored (contexts are cut by `tokens.pack`).

    Attributes:
      vocab_size: one more than the largest id.
      max_id: the largest id.
      eot_id: id of `<|endoftext|>`.
      bos_id: what is put where a text begins: `<|endoftext|>`, as GPT-2 has it.
      default_bos: before each 'document'; see `tokens.resolve_bos`.
      special_ids: ids of all special tokens.
      byte_exact: True: the bytes of a text's tokens are those of the text.
      fingerprint: first 16 hex digits of the sha256 of vocabulary, merges and special tokens.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, str]],
        special: dict[str, int],
    ):
        """Checks and indexes a vocabulary.

        Args:
          vocab: symbol string (in the byte alphabet) to id, without special tokens.
          merges: pairs of symbols, best first.
          special: special token text to id.

        Raises:
          ValueError: bytes or merge results missing from the vocabulary, repeated ids, or no
            `<|endoftext|>`.
        """
        self._vocab, self._merges, self._special = dict(vocab), list(merges), dict(special)
        for text in special:
            self._vocab.pop(text, None)
        symbols = byte_symbols()
        if missing := [byte for byte in range(256) if symbols[byte] not in self._vocab]:
            raise ValueError(
                f"tokenizer: model.vocab lacks the symbols of {len(missing)} bytes, first "
                f"0x{missing[0]:02x}; a byte-level vocabulary needs all 256"
            )
        if END_OF_TEXT not in special:
            raise UnsupportedTokenizerError(
                f"tokenizer: added_tokens has no special token {END_OF_TEXT!r} (found "
                f"{sorted(special)}); add it, it marks the start of every document"
            )
        by_id = {i: text for text, i in [*self._vocab.items(), *special.items()]}
        if len(by_id) != len(self._vocab) + len(special) or min(by_id) < 0:
            raise ValueError("tokenizer: model.vocab and added_tokens give one id to two tokens")
        self.eot_id = special[END_OF_TEXT]
        self.bos_id: int | None = self.eot_id
        self.default_bos = "document"
        self.special_ids = frozenset(special.values())
        self.byte_exact = True
        self.max_id = max(by_id)
        self.vocab_size = self.max_id + 1
        self._pairs: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (left, right) in enumerate(self._merges):
            absent = [s for s in (left, right, left + right) if s not in self._vocab]
            if absent:
                raise ValueError(
                    f"tokenizer: model.merges[{rank}] = {left!r} {right!r} needs {absent[0]!r}, "
                    "which model.vocab lacks; the file is damaged"
                )
            pair = (self._vocab[left], self._vocab[right])
            self._pairs.setdefault(pair, (rank, self._vocab[left + right]))
        self._byte_ids = [self._vocab[symbol] for symbol in symbols]
        byte_of = {symbol: byte for byte, symbol in enumerate(symbols)}
        self._bytes = {i: text.encode() for text, i in special.items()}
        self._bytes |= {i: _raw_bytes(s, byte_of) for s, i in self._vocab.items()}
        self._cache: dict[str, list[int]] = {}
        content = [sorted(self._vocab.items()), self._merges, sorted(special.items())]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a Hugging Face `tokenizer.json` (or a folder that holds one).

        Raises:
          FileNotFoundError: no such file.
          UnsupportedTokenizerError: a field asks for something that is not implemented here.
          ValueError: not JSON, or a damaged vocabulary.
        """
        path = pathlib.Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: a tokenizer.json file is needed")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON text: {error}") from error
        _check_supported(content, path)
        model = content["model"]
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
        special = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        return cls(model["vocab"], merges, special)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json` that the `tokenizers` library reads."""
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        special = sorted(self._special.items(), key=lambda item: item[1])
        vocab = sorted([*self._vocab.items(), *special], key=lambda item: item[1])
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": text, **flags, "normalized": False, "special": True}
                for text, i in special
            ],
            "normalizer": None,
            "pre_tokenizer": {**level, "use_regex": True},
            "post_processor": None,
            "decoder": {**level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": dict(vocab),
                "merges": [list(pair) for pair in self._merges],
            },
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        pathlib.Path(path).write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special tokens are added or recognised.

        Raises:
          ValueError: the text holds a lone surrogate.
        """
        cache, ids = self._cache, []
        for piece in split_pieces(text):
            found = cache.get(piece)
            if found is None:
                found = self._encode_piece(piece)
            ids += found
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; see `encode`."""
        return [self.encode(text) for text in texts]

    def _encode_piece(self, piece: str) -> list[int]:
        ids = merge([self._byte_ids[byte] for byte in _utf8(piece)], self._pairs)
        if len(piece) <= _CACHED_PIECE:
            if len(self._cache) >= _CACHE_ENTRIES:
                self._cache.clear()
            self._cache[piece] = ids
        return ids

    def ids(self) -> list[int]:
        """All ids of the vocabulary, ascending."""
        return sorted(self._bytes)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for.

        Raises:
          ValueError: no such id.
        """
        found = self._bytes.get(int(token))
        if found is None:
            raise ValueError(f"token id {token} is not in the vocabulary of {self.vocab_size} ids")
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: an id that is not in the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        """One token for display: its text, or `<0x..>` for each byte when it is not UTF-8."""
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02x}>" for byte in raw)


def merge(ids: list[int], pairs: dict[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Merges adjacent ids, lowest rank first, leftmost on ties; O(n log n).

    Args:
      ids: ids of the single bytes.
      pairs: (left id, right id) to (rank, merged id).
    """
    end = len(ids)
    if end < 2:
        return ids
    ids, after, before = ids[:], list(range(1, end + 1)), list(range(-1, end - 1))
    queue = [
        (pairs[pair][0], at, pair) for at, pair in enumerate(zip(ids, ids[1:])) if pair in pairs
    ]
    heapq.heapify(queue)
    while queue:
        _, at, pair = heapq.heappop(queue)
        right = after[at]
        if right >= end or (ids[at], ids[right]) != pair:
            continue  # one of the two was merged since this entry was made
        ids[at], ids[right] = pairs[pair][1], -1
        after[at] = following = after[right]
        if following < end:
            before[following] = at
            if found := pairs.get((ids[at], ids[following])):
                heapq.heappush(queue, (found[0], at, (ids[at], ids[following])))
        if (previous := before[at]) >= 0:
            if found := pairs.get((ids[previous], ids[at])):
                heapq.heappush(queue, (found[0], previous, (ids[previous], ids[at])))
    return [i for i in ids if i >= 0]


def _raw_bytes(symbol: str, byte_of: dict[str, int]) -> bytes:
    if any(char not in byte_of for char in symbol):
        raise ValueError(
            f"tokenizer: model.vocab has {symbol!r}, which is not in the byte alphabet; only "
            "byte-level vocabularies are supported"
        )
    return bytes(byte_of[char] for char in symbol)


def _check_supported(content: Any, path: pathlib.Path) -> None:
    """Refuses, naming the field, everything that would give other ids than the file's author's."""

    def refuse(field: str, value: Any, allowed: str) -> None:
        raise UnsupportedTokenizerError(
            f"{path}: {field} = {json.dumps(value)[:120]} is not supported (allowed: {allowed}); "
            "use a model with a GPT-2 style byte-level BPE tokenizer"
        )

    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        refuse("model", None, 'an object with type "BPE"')
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= set(model):
        refuse("model.type", model.get("type"), '"BPE" with vocab and merges')
    for name in ("dropout", "byte_fallback", "ignore_merges"):
        if model.get(name):
            refuse(f"model.{name}", model[name], "null or false")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            refuse(f"model.{name}", model[name], 'null or ""')
    if content.get("normalizer") is not None:
        refuse("normalizer", content["normalizer"], "null")
    pre = content.get("pre_tokenizer") or {}
    if pre.get("type") != "ByteLevel":
        refuse("pre_tokenizer", content.get("pre_tokenizer"), '{"type": "ByteLevel", ...}')
    if pre.get("add_prefix_space"):
        refuse("pre_tokenizer.add_prefix_space", True, "false")
    if pre.get("use_regex", True) is not True:
        refuse("pre_tokenizer.use_regex", pre["use_regex"], "true")
    for name in ("post_processor", "decoder"):
        part = content.get(name)
        if part is not None and part.get("type") != "ByteLevel":
            refuse(name, part, 'null or {"type": "ByteLevel", ...}')
    for index, token in enumerate(content.get("added_tokens") or []):
        if not token.get("special"):
            refuse(f"added_tokens[{index}]", token, "special tokens only")
