"""Ids made elsewhere: every layout gives the same documents, every fault one message."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from saejax.data import bpe, token_arrays
from saejax.data.contexts import load_contexts
from saejax.data.corpus import TextConfig
from saejax.data.token_arrays import TokenDocuments, TokensConfig

TOKENIZER = bpe.Tokenizer(
    {s: i for i, s in enumerate(bpe.byte_symbols())}, [], {bpe.END_OF_TEXT: 256}
)
ROWS = np.random.default_rng(0).integers(0, 256, (40, 16))


def documents(source, **kw):
    """Number to ids over both splits."""
    cfg = TokensConfig(source=str(source), held_out_percent=30, **kw)
    found = {}
    for split in ("train", "held_out"):
        for document in TokenDocuments(cfg, split, TOKENIZER):
            found[int(document.name.rpartition(":")[2])] = document.ids.tolist()
    return [found[i] for i in sorted(found)]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", ">i4"])
def test_rows_of_a_matrix_are_documents(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(token_arrays, "_BLOCK_TOKENS", 50)
    np.save(tmp_path / "a.npy", ROWS.astype(dtype))
    assert documents(tmp_path / "a.npy") == ROWS.tolist()
    if dtype != ">i4":
        save_file({"input_ids": ROWS.astype(dtype)}, tmp_path / "a.safetensors")
        assert documents(tmp_path / "a.safetensors") == ROWS.tolist()


@pytest.mark.parametrize("block", [1, 30, 1 << 20])
def test_flat_ids_are_cut_at_offsets_or_at_a_separator(tmp_path, monkeypatch, block):
    monkeypatch.setattr(token_arrays, "_BLOCK_TOKENS", block)
    parts = [[256, *row[: 3 + i]] for i, row in enumerate(ROWS.tolist()[:12])]
    flat = np.concatenate(parts).astype(np.int32)
    starts = np.cumsum([0, *map(len, parts)])
    np.save(tmp_path / "a.npy", flat)
    assert documents(tmp_path / "a.npy", separator=256) == parts
    for offsets in (starts, starts[:-1].astype(np.uint32)):
        np.save(tmp_path / "starts.npy", offsets)
        given = str(tmp_path / "starts.npy")
        assert documents(tmp_path / "a.npy", offsets=given) == parts
        (tmp_path / "both").mkdir(exist_ok=True)
        save_file({"ids": flat, "starts": offsets}, tmp_path / "both" / "a.safetensors")
        assert documents(tmp_path / "both", field="ids", offsets="starts") == parts


def test_a_separator_that_begins_no_document_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(token_arrays, "_BLOCK_TOKENS", 30)
    with pytest.raises(
        ValueError, match=r"Tokens\.separator = 257 is outside .* \(0 \.\. 256\); g"
    ):
        documents(tmp_path, separator=257)
    np.save(tmp_path / "a.npy", ROWS.reshape(-1))
    save_file({"input_ids": ROWS[:1].reshape(-1)}, tmp_path / "b.safetensors")
    told = rf"Tokens\.separator = 256 .* 0 of 656 tokens of Tokens\.source = '{tmp_path}'.*; give"
    for take in ({}, {"take": "first", "max_documents": 1}):
        with pytest.raises(ValueError, match=told):
            documents(tmp_path, separator=256, **take)
    np.save(tmp_path / "c.npy", [256, 1, 256, 2])  # the other files are a document each
    cfg = TokensConfig(source=str(tmp_path), separator=256, held_out_percent=0)
    found = {d.name: len(d.ids) for d in TokenDocuments(cfg, "train", TOKENIZER)}
    assert found == {"a.npy:0": 640, "b.safetensors:0": 16, "c.npy:0": 2, "c.npy:1": 2}
    np.save(tmp_path / "d.npy", ROWS)
    assert documents(tmp_path / "d.npy", separator=256) == ROWS.tolist()  # rows need none


def test_offsets_inside_the_source_are_no_ids(tmp_path, monkeypatch):
    (tmp_path / "ids").mkdir()
    np.save(tmp_path / "ids" / "a.npy", ROWS.reshape(-1))
    np.save(tmp_path / "ids" / "starts.npy", np.arange(40) * 16)
    monkeypatch.chdir(tmp_path)
    for source, offsets in (
        ("ids", tmp_path / "ids/starts.npy"),
        (tmp_path / "ids", "ids/starts.npy"),
    ):
        assert documents(source, offsets=str(offsets)) == ROWS.tolist()


def test_endings_in_capitals_and_linked_folders_are_read(tmp_path):
    (tmp_path / "ids").mkdir()
    (tmp_path / "more").mkdir()
    np.save(tmp_path / "ids" / "a.npy", ROWS[:20])
    (tmp_path / "ids" / "a.npy").rename(tmp_path / "ids" / "A.NPY")
    save_file({"input_ids": ROWS[20:]}, tmp_path / "more" / "b.Safetensors")
    (tmp_path / "ids" / "link").symlink_to(tmp_path / "more")
    cfg = TokensConfig(source=str(tmp_path / "ids"), held_out_percent=0)
    found = list(TokenDocuments(cfg, "train", TOKENIZER))
    assert [d.ids.tolist() for d in found] == ROWS.tolist()
    assert {d.name.split(":")[0] for d in found} == {"A.NPY", "link/b.Safetensors"}
    assert documents(tmp_path / "ids" / "A.NPY") == ROWS[:20].tolist()


def test_contexts_of_arrays(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    cfg = TokensConfig(source=str(tmp_path / "a.npy"), tails="pad", min_tail=2)
    packed = load_contexts(cfg, "train", TOKENIZER, 6)
    assert packed.length.tolist() == [6, 6, 4] * len(packed.names)
    for i, row in enumerate(packed.tokens):
        source = int(packed.names[packed.document[i]].split(":")[1])
        real = row[: packed.length[i]]
        np.testing.assert_array_equal(real, ROWS[source][packed.offset[i] :][: len(real)])
    assert packed.tokens.dtype == np.uint16 and (packed.byte_start == -1).all()
    with pytest.raises(ValueError, match="context_length = 17: none of the"):
        load_contexts(TokensConfig(source=str(tmp_path / "a.npy")), "train", TOKENIZER, 17)


def test_padding_is_cut_off_and_empty_rows_are_counted(tmp_path):
    rows = ROWS[:6].copy()
    rows[1, 10:] = rows[2, :] = 7
    rows[1, 9] = 8
    np.save(tmp_path / "a.npy", rows)
    found = documents(tmp_path / "a.npy", pad_id=7)
    assert [len(x) for x in found][:2] == [16, 10] and len(found) == 5
    cfg = TokensConfig(source=str(tmp_path / "a.npy"), pad_id=7)
    assert load_contexts(cfg, "train", TOKENIZER, 4).left_out == {"empty_documents": 1}


@pytest.mark.parametrize("pad", [-100, -1, 60_000])
def test_padding_outside_the_vocabulary_is_cut_off(tmp_path, pad):
    rows = ROWS.astype(np.int64)
    rows[1, 10:] = pad
    np.save(tmp_path / "a.npy", rows)
    assert [len(x) for x in documents(tmp_path / "a.npy", pad_id=pad)][:2] == [16, 10]
    told = rf"a.npy, row 1, token 10: id {pad} is outside .* or set Tokens.pad_id = {pad} if it fi"
    with pytest.raises(ValueError, match=told):
        documents(tmp_path / "a.npy")
    rows[0, 0] = pad  # on the left it cannot be cut off
    np.save(tmp_path / "a.npy", rows)
    with pytest.raises(ValueError, match=rf"a.npy:0: Tokens.pad_id = {pad} stands before"):
        documents(tmp_path / "a.npy", pad_id=pad)
    rows[0, 0] = -7
    np.save(tmp_path / "a.npy", rows)
    with pytest.raises(ValueError, match=r"row 0, token 0: id -7 is outside .*own tokenizer$"):
        documents(tmp_path / "a.npy", pad_id=pad)
    with pytest.raises(ValueError, match=r"row 0, token 0: id -7 is outside .*own tokenizer$"):
        documents(tmp_path / "a.npy")  # two of them: it is no padding


def test_limits_count_tokens(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    source = str(tmp_path / "a.npy")
    some = load_contexts(TokensConfig(source=source, max_tokens=100), "train", TOKENIZER, 8)
    assert some.tokens.size == 96 and some.left_out["documents_over_limit"] > 20
    with pytest.raises(ValueError, match=r"Tokens.max_tokens = 3 .* at least 16"):
        load_contexts(TokensConfig(source=source, max_tokens=3), "train", TOKENIZER, 8)


BAD = {
    "negative": (np.array([[1, 2], [3, -100]]), "row 1, token 1: id -100 is outside"),
    "overflow": (np.array([[1, 257]]), "token 1: id 257 is outside the tokenizer's vocabulary"),
    "floats": (np.array([[1.0, 2.0]]), "ids of dtype float64, not integers"),
    "flat": (np.arange(9), "is a flat array of 9 ids: say where"),
    "scalar": (np.array(3), "shape (); give rows of ids [N, T]"),
    "cube": (np.zeros((2, 2, 2), int), "shape (2, 2, 2); give rows of ids [N, T]"),
    "ragged": (np.array([[1, 2], [3]], dtype=object), "holds objects (rows of different lengths?)"),
    "none": (np.zeros((0, 8), int), "holds no tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_named(tmp_path, name):
    array, message = BAD[name]
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        documents(tmp_path / "a.npy")


def test_damaged_and_missing_files_are_named(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"a\.npy is no sound \.npy array"):
        documents(tmp_path / "a.npy")
    save_file({"tokens": ROWS, "acts": ROWS.astype(np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'input_ids' \(Tokens\.field\); it has .*tok"):
        documents(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="tensor 'acts' is of dtype F32, not integers"):
        documents(tmp_path / "b.safetensors", field="acts")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        documents(tmp_path / "b.safetensors", field="tokens")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        documents(tmp_path / "nowhere.npy")
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="a file must end in"):
        documents(tmp_path / "a.bin")


def test_ids_need_no_tokenizer(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    source = str(tmp_path / "a.npy")
    cfg = TokensConfig(source=source, tails="pad", min_tail=1)
    packed = load_contexts(cfg, "train", token_arrays.IdsOnly(256), 5)
    # id 0, with which rows are padded, is a token like any other
    assert (packed.keep == (np.arange(5) < packed.length[:, None])).all() and not packed.keep.all()
    assert (packed.tokens[packed.keep] == 0).any() and packed.bytes_total == 0
    with pytest.raises(ValueError, match=r"outside the tokenizer's vocabulary \(0 \.\. 99\)"):
        load_contexts(cfg, "train", token_arrays.IdsOnly(100), 5)
    (tmp_path / "a.txt").write_text("text " * 99)
    text = TextConfig(source=str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="cannot be encoded without a tokenizer"):
        load_contexts(text, "train", token_arrays.IdsOnly(256), 5)


def test_special_ids_are_masked_without_a_tokenizer(tmp_path):
    flat = np.tile(np.r_[250, 1, np.arange(2, 40), 251], 30)
    np.save(tmp_path / "a.npy", flat)
    cfg = TokensConfig(source=str(tmp_path / "a.npy"), separator=250, pad_id=999)
    known = token_arrays.IdsOnly(256, bos=1, eos=(251, 300), special=(7, -1))
    assert (known.bos_id, known.eot_id, known.special_ids) == (1, 251, {1, 7, 251})
    packed = load_contexts(cfg, "train", known, 4)
    masked = np.isin(packed.tokens, [250, 1, 7, 251])
    assert {250, 1, 7} <= set(packed.tokens[masked].tolist())
    np.testing.assert_array_equal(packed.keep, ~masked)
    unknown = load_contexts(cfg, "train", token_arrays.IdsOnly(256), 4)
    np.testing.assert_array_equal(unknown.keep, unknown.tokens != 250)  # the separator is known
    assert unknown.fingerprint != packed.fingerprint
    offsets = TokensConfig(source=str(tmp_path / "a.npy"), offsets=str(tmp_path / "o.npy"))
    np.save(tmp_path / "o.npy", np.flatnonzero(flat == 250))
    assert load_contexts(offsets, "train", token_arrays.IdsOnly(256), 4).keep.all()


@pytest.mark.parametrize("starts", [[1, 4], [0, 5, 3], [0, 50], [0.0, 3.0], [[0, 3]], []])
def test_bad_offsets_are_named(tmp_path, starts):
    np.save(tmp_path / "a.npy", np.arange(20))
    np.save(tmp_path / "starts.npy", np.array(starts))
    with pytest.raises(ValueError, match="must hold integers that ascend from 0 and end below 20"):
        documents(tmp_path / "a.npy", offsets=str(tmp_path / "starts.npy"))


def test_a_second_bos_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.concatenate([np.full((40, 1), 256), ROWS], axis=1))
    with pytest.raises(ValueError, match="begins with the BOS token 256 already"):
        documents(tmp_path / "a.npy", bos="context")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"source": ""}, "Tokens.source is empty"),
        ({"max_tokens": 0}, "Tokens.max_tokens = 0"),
        ({"separator": -1}, "Tokens.separator = -1"),
        ({"min_tail": 0}, "Tokens.min_tail = 0"),
        ({"tails": "keep"}, "Tokens.tails = 'keep'"),
        ({"offsets": "a", "separator": 1}, "say the same"),
    ],
)
def test_settings_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokensConfig(**{"source": "a.npy", **fields})


def test_lists_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    lists = [row[: 2 + i % 9] for i, row in enumerate(ROWS.tolist())]
    fixed = pyarrow.array(ROWS.tolist(), pyarrow.list_(pyarrow.int32(), 16))
    table = pyarrow.table({"input_ids": lists, "fixed": fixed, "n": [len(x) for x in lists]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    assert documents(tmp_path / "a.parquet") == lists
    assert documents(tmp_path / "a.parquet", field="fixed") == ROWS.tolist()
    with pytest.raises(ValueError, match=r"column 'n' .* holds int64, not lists of ids"):
        documents(tmp_path / "a.parquet", field="n")


def test_nulls_among_ids_are_named(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    lists = [[1, 2], None, [3], *([[4, 5]] * 300), [6, None]]
    parquet.write_table(pyarrow.table({"input_ids": lists}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a\.parquet, row 303: column 'input_ids' .* holds a null"
    ):
        documents(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"input_ids": lists[:-1]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == [x for x in lists[:-1] if x]
    with pytest.raises(ValueError, match="a:0 holds a null among its ids; give integers only"):
        token_arrays.list_of_ids([6, None], "a:0")


@pytest.mark.filterwarnings("ignore")
def test_lists_of_a_streamed_dataset(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "data").mkdir()
    table = pyarrow.table({"input_ids": ROWS.tolist(), "nested": [[r] for r in ROWS.tolist()]})
    parquet.write_table(table, tmp_path / "data" / "a.parquet")
    assert documents(f"hf:{tmp_path / 'data'}") == ROWS.tolist()
    with pytest.raises(ValueError, match=r":0: an array of shape \(1, 16\), not a list of ids"):
        documents(f"hf:{tmp_path / 'data'}", field="nested")
