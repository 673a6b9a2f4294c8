"""Packing: rows of tokens that can be traced back to their documents."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.data import bpe_train, tokens
from saejax.data.corpus import Document

TOKENIZER = bpe_train.train(["the cat sat on the mat, the cat ran"] * 2, 270)
LENGTH = 4
texts = st.lists(st.text("the catsonmr,é", max_size=60), max_size=6)


@settings(deadline=None)
@given(texts, st.booleans())
def test_rows_are_slices_of_their_documents(raw, add_eot):
    documents = [Document(str(i), text) for i, text in enumerate(raw)]
    ids = [[TOKENIZER.eot_id] * add_eot + TOKENIZER.encode(d.text) for d in documents]
    rows = sum(len(x) // LENGTH for x in ids)
    if not rows:
        with pytest.raises(ValueError, match="none of the"):
            tokens.pack(documents, TOKENIZER, LENGTH, add_eot)
        return
    packed = tokens.pack(documents, TOKENIZER, LENGTH, add_eot)
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
    assert TOKENIZER.eot_id not in tokens.pack(documents, TOKENIZER, 8, add_eot=False).tokens


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
