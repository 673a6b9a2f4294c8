"""Tokens as text that can be shown: whole characters, visible whitespace, nothing that acts."""

from __future__ import annotations

import codecs
import dataclasses
import html
import re
import unicodedata
from collections.abc import Iterable

import numpy as np

_GLYPHS = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
# Control, format (bidi overrides, zero width), surrogate, private, unassigned, separators.
_RUN = 4  # longer runs of spaces, mostly indentation, would push the words out of a line
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKED = re.compile(r" {2,}|^ +$|[^ -~]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of tokens that forms whole characters; nearly always a single token.

    Attributes:
      text: its decoded text.
      start, stop: its tokens, as positions in the context.
      value: the latent's largest value on them; 0 where it is not active.
    """

    text: str
    start: int
    stop: int
    value: float


def pieces(tokenizer, ids: Iterable[int], values: np.ndarray) -> list[Piece]:
    """Cuts a context into pieces; tokens that share a UTF-8 character stay together.

    Bytes that are no UTF-8 (a character cut by the context's edge) show as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ids = [int(i) for i in ids]
    result, text, start = [], "", 0
    for at, token in enumerate(ids):
        text += decoder.decode(tokenizer.token_bytes(token), final=at == len(ids) - 1)
        if decoder.getstate()[0]:
            continue
        peak = float(np.max(values[start : at + 1]))
        result.append(Piece(text=text, start=start, stop=at + 1, value=peak))
        text, start = "", at + 1
    return result


def visible_char(char: str) -> str:
    """One character as something that shows and does nothing: ``↵`` for a newline, and so on."""
    if char in _GLYPHS:
        return _GLYPHS[char]
    if char < " ":
        return chr(0x2400 + ord(char))
    if unicodedata.category(char) in _UNSEEN:
        return f"⟨U+{ord(char):04X}⟩"
    if unicodedata.combining(char):
        return "◌" + char
    return char


def spaces(count: int) -> str:
    """A run of spaces: a dot for each, or ``⋯`` for more than four."""
    return "·" * count if count <= _RUN else "⋯"


def visible(text: str) -> str:
    """``text`` on one line, every character of it visible; runs of spaces as ``spaces``."""
    spaced = re.sub(r" {2,}|^ +$", lambda m: spaces(len(m[0])), text)
    return "".join(map(visible_char, spaced))


def markup(text: str, *, lines: bool = False) -> str:
    """``text`` as safe HTML with what is not plain text marked up as ``<i>``.

    Args:
      text: decoded text of any kind; all of it is escaped.
      lines: break lines after each newline's glyph and leave runs of spaces as they are.
    """

    def mark(match: re.Match[str]) -> str:
        run = match[0]
        if run[0] == " ":
            return run if lines else f"<i>{spaces(len(run))}</i>"
        return "".join(map(one, run))

    def one(char: str) -> str:
        shown = visible_char(char)
        marked = html.escape(shown) if shown == char else f"<i>{html.escape(shown)}</i>"
        return marked + "\n" if lines and char == "\n" else marked

    out, at = [], 0
    for match in _MARKED.finditer(text):
        out.append(html.escape(text[at : match.start()]))
        out.append(mark(match))
        at = match.end()
    return "".join(out) + html.escape(text[at:])
