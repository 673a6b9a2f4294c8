"""Packing: rows of tokens that can be traced back to their documents."""

import dataclasses
import hashlib
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.data import bpe_train, tokens
from saejax.data.bpe import Tokenizer
from saejax.data.corpus import Document

TOKENIZER = bpe_train.train(["the cat sat on the mat, the cat ran"] * 2, 270)
LENGTH = 4
EMBEDDED = pathlib.Path(tokens.__file__).parents[1] / "subjects" / "embedded"
texts = st.lists(st.text("the catsonmr,é", max_size=60), max_size=6)


@settings(deadline=None)
@given(texts, st.booleans())
def test_rows_are_slices_of_their_documents(raw, add_eot):
    bos = "document" if add_eot else "none"
    documents = [Document(str(i), text) for i, text in enumerate(raw)]
    ids = [[TOKENIZER.eot_id] * add_eot + TOKENIZER.encode(d.text) for d in documents]
    rows = sum(len(x) // LENGTH for x in ids)
    if not rows:
        with pytest.raises(ValueError, match="none of the"):
            tokens.pack(documents, TOKENIZER, LENGTH, bos=bos)
        return
    packed = tokens.pack(documents, TOKENIZER, LENGTH, bos=bos)
    assert packed.tokens.shape == (rows, LENGTH) and packed.tokens.dtype == np.uint16
    assert packed.document.dtype == packed.offset.dtype == np.int32
    assert packed.names == tuple(d.name for d in documents)
    for row, document, offset in zip(packed.tokens, packed.document, packed.offset):
        assert row.tolist() == ids[document][offset : offset + LENGTH]
    assert packed.dropped_tokens == sum(map(len, ids)) - packed.tokens.size
    kept = b"".join(TOKENIZER.token_bytes(t) for t in packed.tokens.flat if t)
    assert packed.bytes_total == len(kept)


def test_every_document_starts_with_the_marker_and_no_other_row_has_it():
    documents = [Document(name, "the cat sat on the mat " * 9) for name in "ab"]
    packed = tokens.pack(documents, TOKENIZER, 8)
    marked = np.argwhere(packed.tokens == TOKENIZER.eot_id)
    assert marked.tolist() == [[i, 0] for i in np.flatnonzero(packed.offset == 0)]
    assert len(marked) == 2
    assert TOKENIZER.eot_id not in tokens.pack(documents, TOKENIZER, 8, bos="none").tokens


def test_the_fingerprint_follows_tokens_names_and_shape():
    one = [Document("a", "the cat sat on the mat"), Document("b", "the mat sat on the cat")]
    renamed = [one[0], dataclasses.replace(one[1], name="c")]
    variants = [(one, 4), (one, 2), (renamed, 4), (one[::-1], 4)]
    seen = {tokens.pack(documents, TOKENIZER, length).fingerprint for documents, length in variants}
    assert len(seen) == len(variants)
    assert tokens.pack(one, TOKENIZER, 4).fingerprint == tokens.pack(one, TOKENIZER, 4).fingerprint


def test_short_input_is_refused():
    with pytest.raises(ValueError, match="context_length = 1"):
        tokens.pack([Document("a", "x" * 9)], TOKENIZER, 1)
    with pytest.raises(ValueError, match="context_length = 500: none of the 1 documents"):
        tokens.pack([Document("a", "x" * 9)], TOKENIZER, 500)
    with pytest.raises(ValueError, match="none of the 0 documents"):
        tokens.pack([], TOKENIZER, 4)


def test_byte_lengths_count_no_marker():
    lengths = tokens.byte_lengths(TOKENIZER)
    assert lengths[TOKENIZER.eot_id] == 0 and lengths[1:257].tolist() == [1] * 256
    ids = TOKENIZER.encode("the cat ès")
    assert lengths[ids].sum() == len("the cat ès".encode())


class Wordy:
    """A tokenizer of words, with BOS 1, EOT 0 and another special id 2."""

    vocab_size, max_id, eot_id, bos_id, default_bos = 1000, 999, 0, 1, "context"
    special_ids, byte_exact, fingerprint = frozenset({0, 1, 2}), False, "wordy"

    def encode(self, text):
        return [3 + len(word) for word in text.split()]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def ids(self):
        return list(range(self.vocab_size))

    def token_bytes(self, token):
        return b"<s>" if token in self.special_ids else b"x" * (token - 3)


def numbered(n, name="a"):
    """A document whose word i has i letters."""
    return Document(name, " ".join("x" * (i + 1) for i in range(n)))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.sampled_from(["auto", "none", "document", "context"]),
    st.sampled_from(["drop", "pad"]),
    st.integers(1, 5),
)
def test_every_row_can_be_traced_and_every_token_accounted_for(sizes, bos, tails, min_tail):
    tokenizer, length = Wordy(), 8
    documents = [numbered(n, str(i)) for i, n in enumerate(sizes)]
    lead = int(bos in ("auto", "context"))
    ids = [[1] * (bos == "document") + tokenizer.encode(d.text) for d in documents]
    room = length - lead
    kept = [
        n // room * room + (n % room if tails == "pad" and n % room >= min_tail else 0)
        for n in map(len, ids)
    ]
    rules = {"bos": bos, "tails": tails, "min_tail": min_tail}
    if not sum(kept):
        with pytest.raises(ValueError, match="none of the"):
            tokens.pack(documents, tokenizer, length, **rules)
        return
    packed = tokens.pack(documents, tokenizer, length, **rules)
    found = [[] for _ in ids]
    for i, row in enumerate(packed.tokens):
        real = row[lead : packed.length[i]].tolist()
        document, offset = packed.document[i], packed.offset[i]
        assert row[:lead].tolist() == [1] * lead
        assert (row[packed.length[i] :] == tokenizer.eot_id).all()
        assert real == ids[document][offset : offset + len(real)] and real
        found[document] += real
    assert [len(x) for x in found] == kept
    assert packed.dropped_tokens == sum(map(len, ids)) - sum(kept)
    assert packed.left_out.get("documents_without_a_row", 0) == kept.count(0)
    columns = np.arange(length)
    real = (columns < packed.length[:, None]) & (columns >= lead) & (packed.tokens != 1)
    np.testing.assert_array_equal(packed.keep, real)
    assert packed.bytes_total == (packed.tokens[real].astype(int) - 3).sum()
    assert packed.lead == lead and packed.keep.dtype == bool and packed.length.dtype == np.int32


def test_special_tokens_are_masked_wherever_they_stand():
    ids = np.array([5, 2, 6, 1, 7, 0, 8, 9])
    document = tokens.TokenDocument("a", ids, -1, bytes(32))
    packed = tokens.pack_tokens([document], Wordy(), 8, bos="none")
    assert packed.keep.tolist() == [[True, False, True, False, True, False, True, True]]
    assert packed.byte_start.tolist() == [-1] and packed.document_bytes.tolist() == [-1]


def test_padding_and_lengths_are_part_of_the_fingerprint():
    def fingerprint(ids):
        document = tokens.TokenDocument("a", np.array(ids), -1, bytes(32))
        rules = {"bos": "none", "tails": "pad", "min_tail": 1}
        return tokens.pack_tokens([document], Wordy(), 4, **rules).fingerprint

    assert fingerprint([5, 6, 7]) != fingerprint([5, 6, 7, Wordy.eot_id])


def test_rows_know_their_bytes():
    documents = [Document(name, "the cat sat on the mat, è " * 7 + name) for name in "ab"]
    packed = tokens.pack(documents, TOKENIZER, 8, tails="pad", min_tail=2)
    assert packed.document_bytes.tolist() == [len(d.text.encode()) for d in documents]
    for document, digest in zip(documents, packed.document_sha256):
        assert hashlib.sha256(document.text.encode()).digest() == digest.tobytes()
    for i, row in enumerate(packed.tokens):
        raw = documents[packed.document[i]].text.encode()
        here = b"".join(TOKENIZER.token_bytes(t) for t in row[packed.keep[i]])
        start = packed.byte_start[i]
        assert here and raw[start : start + len(here)] == here


def test_the_embedded_models_contexts_have_not_changed():
    # Every store that was harvested from them names this fingerprint.
    text = "def f(x):\n    return x\n\n\n" * 20
    documents = [Document("a.py", text), Document("b.py", text[9:])]
    embedded = Tokenizer.load(EMBEDDED)
    packed = tokens.pack(documents, embedded, 64)
    assert packed.fingerprint == "bef83d57a9fcc8e2"
    assert packed.keep[0].tolist() == [False] + [True] * 63 and (packed.length == 64).all()


def test_documents_are_read_a_batch_at_a_time(monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(tokens, "_FLUSH_TOKENS", 16)
    given, sink = [], tokens.MemorySink()
    append, parts = sink.append, []

    def documents():
        for i in range(40):
            given.append(i)
            yield numbered(20, str(i))

    def watched(columns):
        parts.append((len(given), len(columns["tokens"])))
        append(columns)

    sink.append = watched
    packed = tokens.pack(documents(), Wordy(), 8, bos="none", sink=sink)
    assert len(packed.tokens) == 80 == sum(n for _, n in parts)
    assert parts[0] == (4, 2) and len(parts) == 40
    monkeypatch.undo()
    whole = tokens.pack([numbered(20, str(i)) for i in range(40)], Wordy(), 8, bos="none")
    assert whole.fingerprint == packed.fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bos": "sometimes"}, "bos = 'sometimes'"),
        ({"tails": "keep"}, "tails = 'keep'"),
        ({"tails": "pad"}, "min_tail = 16: with context_length = 8 tails are shorter than 7"),
    ],
)
def test_rules_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tokens.pack([numbered(30)], Wordy(), 8, **change)


def test_a_tokenizer_without_bos_puts_none():
    plain = Wordy()
    plain.bos_id = None
    with pytest.raises(ValueError, match="the tokenizer has no beginning-of-sequence token"):
        tokens.pack([numbered(30)], plain, 8, bos="document")


def test_a_lone_surrogate_is_named_with_its_document():
    with pytest.raises(ValueError, match=r"a\.jsonl:7: character 3 is a lone surrogate"):
        tokens.pack([Document("a.jsonl:7", "abc\ud800" * 9)], Wordy(), 4)
