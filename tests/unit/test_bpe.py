"""Byte-level BPE: the ids of the `tokenizers` library, without that library."""

import json
import pathlib
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.data import bpe, bpe_train

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text(encoding="utf-8")
)
EMBEDDED = pathlib.Path(bpe.__file__).parents[1] / "subjects" / "embedded" / "tokenizer.json"
TOKENIZER = bpe.Tokenizer.load(EMBEDDED)


@pytest.mark.parametrize("number", range(len(GOLDEN["texts"])))
def test_ids_are_those_of_the_reference_library(number):
    text, ids = GOLDEN["texts"][number], GOLDEN["ids"][number]
    if "<|endoftext|>" not in text:
        assert TOKENIZER.encode(text) == ids
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_training_gives_the_merges_of_the_reference_library():
    trained = bpe_train.train(GOLDEN["texts"], 420)
    assert [list(pair) for pair in trained._merges] == GOLDEN["merges"]
    assert trained.vocab_size == 420 and trained.eot_id == 0


def test_training_does_not_depend_on_the_order_of_texts():
    texts = ["low lower lowest", "new newer newest", "wide wider widest"] * 3
    one, other = (bpe_train.train(order, 290) for order in (texts, texts[::-1]))
    assert one.fingerprint == other.fingerprint


def test_training_stops_when_no_pair_repeats():
    assert bpe_train.train(["abab"], 4096).vocab_size == 258
    with pytest.raises(ValueError, match="nothing to learn from"):
        bpe_train.train(["a", "b"], 300)
    with pytest.raises(ValueError, match="vocab_size = 256"):
        bpe_train.train(["abab"], 256)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_decoding_undoes_encoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(" \t\n\x1c\x85\u3000aé٣²_'s.")))
def test_pieces_follow_the_categories_of_unicode(text):
    pieces = bpe.split_pieces(text)
    assert "".join(pieces) == text
    for piece in pieces:
        body = piece.removeprefix(" ") or piece
        kinds = {kind(char) for char in body}
        assert len(kinds) == 1 or piece in ("'s", "'t", "'m", "'d", "'re", "'ve", "'ll")


def kind(char: str) -> str:
    if char in "\t\n\x0b\x0c\r \x85\xa0" or unicodedata.category(char)[0] == "Z":
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(char)[0], "other")


@settings(deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_ascii_pattern_agrees_with_the_unicode_pattern(text):
    assert bpe._ascii_pattern().findall(text) == bpe._unicode_pattern().findall(text)


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(257, 330))
def test_merging_equals_the_plain_algorithm(raw, n_merges):
    ids = [TOKENIZER._byte_ids[byte] for byte in raw]
    pairs = dict(list(TOKENIZER._pairs.items())[: n_merges * 10])
    plain = list(ids)
    while found := [
        (pairs[pair][0], i) for i, pair in enumerate(zip(plain, plain[1:])) if pair in pairs
    ]:
        _, at = min(found)
        plain[at : at + 2] = [pairs[plain[at], plain[at + 1]][1]]
    assert bpe.merge(ids, pairs) == plain


def test_a_long_piece_is_merged_in_reasonable_time():
    ids = TOKENIZER.encode("etaoinshrdlu" * 20_000)  # one piece; a quadratic merge takes minutes
    assert TOKENIZER.decode(ids) == "etaoinshrdlu" * 20_000


def test_special_tokens_come_from_packing_only():
    ids = TOKENIZER.encode("<|endoftext|>")
    assert TOKENIZER.eot_id not in ids and TOKENIZER.decode(ids) == "<|endoftext|>"
    assert TOKENIZER.decode([TOKENIZER.eot_id]) == "<|endoftext|>"


def test_broken_utf8_decodes_to_replacement_characters():
    assert TOKENIZER.decode(TOKENIZER.encode("€")[:1]) == "\ufffd"
    byte = TOKENIZER._byte_ids[0xC3]
    assert TOKENIZER.token_text(byte) == "<0xc3>" and TOKENIZER.token_bytes(byte) == b"\xc3"


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="token id 4096 is not in the vocabulary of 4096"):
        TOKENIZER.decode([4096])
    with pytest.raises(ValueError, match="lone surrogate"):
        TOKENIZER.encode("x\ud800")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        bpe.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        bpe.Tokenizer.load(tmp_path)


def test_saving_and_loading_keeps_everything(tmp_path):
    trained = bpe_train.train(GOLDEN["texts"], 420)
    trained.save(tmp_path / "tokenizer.json")
    loaded = bpe.Tokenizer.load(tmp_path)
    assert loaded.fingerprint == trained.fingerprint != TOKENIZER.fingerprint
    for text in GOLDEN["texts"]:
        assert loaded.encode(text) == trained.encode(text)
    assert loaded.ids() == list(range(420))


REFUSALS = [
    ("model.type", lambda c: c["model"].update(type="WordPiece")),
    ("model.byte_fallback", lambda c: c["model"].update(byte_fallback=True)),
    ("model.ignore_merges", lambda c: c["model"].update(ignore_merges=True)),
    ("model.dropout", lambda c: c["model"].update(dropout=0.1)),
    ("model.end_of_word_suffix", lambda c: c["model"].update(end_of_word_suffix="</w>")),
    ("normalizer", lambda c: c.update(normalizer={"type": "NFC"})),
    ("pre_tokenizer", lambda c: c.update(pre_tokenizer={"type": "Whitespace"})),
    ("pre_tokenizer", lambda c: c.update(pre_tokenizer=None)),
    ("pre_tokenizer.add_prefix_space", lambda c: c["pre_tokenizer"].update(add_prefix_space=True)),
    ("pre_tokenizer.use_regex", lambda c: c["pre_tokenizer"].update(use_regex=False)),
    ("post_processor", lambda c: c.update(post_processor={"type": "TemplateProcessing"})),
    ("decoder", lambda c: c.update(decoder={"type": "Metaspace"})),
    ("added_tokens[0]", lambda c: c["added_tokens"][0].update(special=False)),
    ("added_tokens", lambda c: c.update(added_tokens=[])),
    ("model.merges[0]", lambda c: c["model"]["merges"].insert(0, ["q", "zq"])),
    ("model.vocab", lambda c: c["model"]["vocab"].pop("a")),
    ("model.vocab", lambda c: c["model"]["vocab"].update(a=9, b=9)),
    ("model", lambda c: c.pop("model")),
]


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_what_is_not_implemented_is_refused_by_name(number, tmp_path):
    field, change = REFUSALS[number]
    content = json.loads(EMBEDDED.read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(field)):
        bpe.Tokenizer.load(tmp_path)


def test_merges_may_be_strings_as_in_older_files(tmp_path):
    content = json.loads(EMBEDDED.read_text(encoding="utf-8"))
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert bpe.Tokenizer.load(tmp_path).fingerprint == TOKENIZER.fingerprint
