"""Tokenizers of model folders: plain Python where it is exact, else the `tokenizers` library.

Both read `tokenizer.json`; no code of a model is ever run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from saejax.data.bpe import Tokenizer, UnsupportedTokenizerError, _utf8, byte_symbols
from saejax.data.readers import extra

# Models trained with a beginning-of-sequence token in front of whatever they read. Used where the
# tokenizer's own files do not say.
_BOS_EVERY_CONTEXT = ("llama", "mistral", "mixtral", "gemma")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True)
class Marks:
    """What a folder's files say about special tokens.

    Attributes:
      bos, eos, pad: texts or ids of the tokens; None where there is none.
      default_bos: where a BOS belongs: 'none', 'document' or 'context'.
    """

    bos: str | int | None
    eos: str | int | None
    pad: str | int | None
    default_bos: str


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer | LibraryTokenizer:
    """Reads the tokenizer of a model folder.

    `tokenizer.json` is needed; tokenizer_config.json, special_tokens_map.json and config.json say
    which tokens begin and end a text, in this order. A byte-level BPE with GPT-2's pre-tokenizer is
    run in plain Python, anything else by the `tokenizers` library.

    Raises:
      FileNotFoundError: no tokenizer.json; says how to make one.
      ValueError: a file is damaged, names a token that does not exist, or needs the library and
        it is not installed.
    """
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}: a tokenizer.json file is needed; with transformers, "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes one"
        )
    try:
        plain = Tokenizer.load(path)
    except UnsupportedTokenizerError as reason:
        return LibraryTokenizer(path, _marks(folder, _read(path)), str(reason))
    marks = _marks(folder, _read(path))
    if (folder / "config.json").is_file():
        special = {plain.decode([i]): i for i in plain.special_ids}
        found = _resolve(marks.bos, special, folder, "bos_token")
        plain.bos_id = plain.eot_id if found is None else found
        plain.default_bos = marks.default_bos
    return plain


class LibraryTokenizer:
    """A `tokenizer.json` run by the `tokenizers` library, behind the interface of `bpe.Tokenizer`.

    No special token is added when encoding, and none is recognised in a text: one that is written
    there is encoded as ordinary text. Truncation and padding settings of the file are ignored.

    Attributes:
      vocab_size: one more than the largest id.
      max_id: the largest id.
      eot_id: id of the end-of-sequence token (of padding or BOS where there is none).
      bos_id: id of the beginning-of-sequence token, or None.
      default_bos: where a BOS belongs: 'none', 'document' or 'context'.
      special_ids: ids of all special tokens.
      byte_exact: whether the bytes of a text's tokens are those of the text: False where the file
        normalises text or puts a space before it.
      fingerprint: first 16 hex digits of the sha256 of the file and the special ids.
    """

    def __init__(self, path: pathlib.Path, marks: Marks, reason: str):
        """Loads the file.

        Args:
          path: tokenizer.json.
          marks: special tokens.
          reason: why the plain one does not do, for the message when the library is missing.

        Raises:
          ValueError: the library is missing or refuses the file, or a kind of vocabulary of which
            nobody here knows what bytes its tokens stand for.
        """
        library = extra("tokenizers", f"{reason}; this tokenizer")
        raw = path.read_bytes()
        self._content = _read(path)
        try:
            self._library = library.Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: the tokenizers library refuses it: {error}") from error
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        self._vocab: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        added = self._content.get("added_tokens") or []
        self._added = {token["id"]: token["content"] for token in added}
        self._kind = _kind(self._content, path)
        self.max_id = max(self._vocab.values())
        self.vocab_size = self.max_id + 1
        folder, known = path.parent, self._vocab
        ids = {
            name: _resolve(mark, known, folder, f"{name}_token")
            for name, mark in (("bos", marks.bos), ("eos", marks.eos), ("pad", marks.pad))
        }
        self.bos_id = ids["bos"]
        last = [i for i in (ids["eos"], ids["pad"], ids["bos"]) if i is not None]
        if not last:
            raise ValueError(
                f"{folder}: neither tokenizer_config.json nor config.json names an eos_token, "
                "pad_token or bos_token, so rows could not be padded; add one"
            )
        self.eot_id = last[0]
        self.default_bos = marks.default_bos if self.bos_id is not None else "none"
        special = {token["id"] for token in added if token.get("special")}
        self.special_ids = frozenset(special | set(last))
        self.byte_exact = self._kind == "bytes" and _keeps_text(self._content)
        digest = hashlib.sha256(raw)
        digest.update(json.dumps([self.bos_id, self.eot_id, sorted(self.special_ids)]).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special tokens are added or recognised.

        Raises:
          ValueError: the text holds a lone surrogate.
        """
        _utf8(text)
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores; the texts must be free of lone surrogates."""
        encode = getattr(self._library, "encode_batch_fast", self._library.encode_batch)
        return [found.ids for found in encode(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special ones written out; bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: an id that is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        raw = b"".join(map(self.token_bytes, ids))
        if self._kind == "bytes":  # the library garbles added tokens that are not ASCII
            return raw.decode("utf-8", errors="replace")
        return self._library.decode(ids, skip_special_tokens=False)

    def ids(self) -> list[int]:
        """All ids of the vocabulary, ascending."""
        return sorted(self._bytes)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; a leading space is part of it.

        Raises:
          ValueError: no such id.
        """
        found = self._bytes.get(int(token))
        if found is None:
            raise ValueError(f"token id {token} is not in the vocabulary of {self.vocab_size} ids")
        return found

    def token_text(self, token: int) -> str:
        """One token for display: its text, or `<0x..>` for each byte when it is not UTF-8."""
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02x}>" for byte in raw)

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        fallback = bool(self._content["model"].get("byte_fallback"))

        def raw(symbol: str) -> bytes:
            if self._kind == "bytes" and all(char in byte_of for char in symbol):
                return bytes(byte_of[char] for char in symbol)
            if self._kind == "pieces":
                found = _BYTE.fullmatch(symbol) if fallback else None
                return bytes([int(found[1], 16)]) if found else symbol.replace("▁", " ").encode()
            if self._kind == "words":
                return (symbol[2:] if symbol.startswith("##") else f" {symbol}").encode()
            return symbol.encode()

        found = {i: raw(symbol) for symbol, i in self._vocab.items()}
        return found | {i: text.encode() for i, text in self._added.items()}


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON text: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return content


def _marks(folder: pathlib.Path, content: Mapping[str, Any]) -> Marks:
    config = _read(folder / "config.json")
    settings = _read(folder / "tokenizer_config.json")
    files = [settings, _read(folder / "special_tokens_map.json")]
    nested = config.get("text_config")

    def mark(name: str) -> str | int | None:
        for file in files:
            if f"{name}_token" in file:  # null says that there is none
                value = file[f"{name}_token"]
                return value["content"] if isinstance(value, dict) else value
        for file in (config, nested if isinstance(nested, dict) else {}):
            value = file.get(f"{name}_token_id")
            if value is not None:
                return value[0] if isinstance(value, list) else value
        return None

    leading = _leading_special(content)
    bos = mark("bos")
    bos = leading if bos is None else bos
    family = str(config.get("model_type", ""))
    if family == "gpt2":
        default = "document"
    elif isinstance(settings.get("add_bos_token"), bool):
        default = "context" if settings["add_bos_token"] else "none"
    elif content.get("post_processor") is not None:
        default = "context" if leading is not None else "none"
    else:
        default = "context" if family.startswith(_BOS_EVERY_CONTEXT) else "none"
    return Marks(bos, mark("eos"), mark("pad"), default)


def _leading_special(content: Mapping[str, Any]) -> str | None:
    """The special token that the file's post-processor puts before a text."""
    for part in _parts(content.get("post_processor"), "processors"):
        if part.get("type") == "TemplateProcessing" and part.get("single"):
            first = part["single"][0].get("SpecialToken")
            return first["id"] if first else None
        if part.get("type") in ("BertProcessing", "RobertaProcessing"):
            return part["cls"][0]
    return None


def _parts(part: Mapping[str, Any] | None, inside: str) -> Iterator[Mapping[str, Any]]:
    """A pipeline stage, or those of a sequence."""
    if part and part.get("type") == "Sequence":
        for inner in part.get(inside) or []:
            yield from _parts(inner, inside)
    elif part:
        yield part


def _resolve(
    mark: str | int | None, known: Mapping[str, int], folder: pathlib.Path, name: str
) -> int | None:
    if not isinstance(mark, str):  # ids of config.json: often left at another model's default
        return mark if mark in known.values() else None
    if mark not in known:
        raise ValueError(
            f"{folder}: {name} = {mark!r} is not in tokenizer.json; take the files of one model"
        )
    return known[mark]


def _kind(content: Mapping[str, Any], path: pathlib.Path) -> str:
    """How symbols stand for text: 'bytes', SentencePiece 'pieces' or WordPiece 'words'."""
    stages = [
        *_parts(content.get("decoder"), "decoders"),
        *_parts(content.get("pre_tokenizer"), "pretokenizers"),
        *_parts(content.get("normalizer"), "normalizers"),
    ]
    types = {stage.get("type") for stage in stages}
    if "ByteLevel" in types:
        return "bytes"
    if content["model"].get("type") == "WordPiece":
        return "words"
    if "Metaspace" in types or any("▁" in json.dumps(s, ensure_ascii=False) for s in stages):
        return "pieces"
    raise ValueError(
        f"{path}: decoder = {json.dumps(content.get('decoder'))[:120]} is of no known kind "
        "(byte-level, SentencePiece or WordPiece), so what its tokens stand for is unknown"
    )


def _keeps_text(content: Mapping[str, Any]) -> bool:
    """Whether nothing rewrites a text before its bytes become tokens."""
    stages = [*_parts(content.get("pre_tokenizer"), "pretokenizers")]
    spaced = any(stage.get("add_prefix_space") for stage in stages)
    trimmed = [t for t in content.get("added_tokens") or [] if t.get("lstrip") or t.get("rstrip")]
    return content.get("normalizer") is None and not spaced and not trimmed
