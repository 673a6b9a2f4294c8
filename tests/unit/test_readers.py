"""Files and streamed datasets of text: read lazily, and every fault named with its place."""

import concurrent.futures
import gc
import gzip
import json
import re
import sys
import time

import numpy as np
import pytest

from saejax.data import readers, splits
from saejax.data.corpus import Documents, TextConfig, read_documents
from saejax.data.splits import hash_fraction

TEXTS = [f"document {i} says é and {'x' * i}" for i in range(30)]


def lines(field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS))


def everything(source, **kw):
    """Name to text over both splits."""
    found = []
    for split in ("train", "held_out"):
        found += read_documents(TextConfig(source=str(source), held_out_percent=30, **kw), split)
    return {d.name: d.text for d in found}


def test_compressed_lines_are_those_of_the_plain_file(tmp_path):
    raw = lines().encode()
    (tmp_path / "a.jsonl").write_bytes(raw)
    half = raw.index(b"\n", len(raw) // 2) - 3  # members need not end where lines do
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw[:half]) + gzip.compress(raw[half:]))
    plain, packed = everything(tmp_path / "a.jsonl"), everything(tmp_path / "a.jsonl.gz")
    expected = {i + 1: text for i, text in enumerate(TEXTS)}
    assert {int(name.removeprefix("a.jsonl:")): t for name, t in plain.items()} == expected
    assert {int(name.removeprefix("a.jsonl.gz:")): t for name, t in packed.items()} == expected


def test_lines_longer_than_a_chunk_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines().encode()))
    assert sorted(everything(tmp_path / "a.jsonl.gz").values()) == sorted(TEXTS)
    text = "é\r\nab\r\n€uro 😀\rlone\r\n" * 40
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "".join(readers._decoded(tmp_path / "t.txt")) == text.replace("\r\n", "\n")


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_a_large_text_file_is_cut_without_loss(tmp_path, monkeypatch, chunk):
    text = "".join(f"line {i} of a book\n" for i in range(900))
    path = tmp_path / "book.txt"
    path.write_text(text)
    whole = list(readers.blocks("book.txt", iter([text])))
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    monkeypatch.setattr(readers, "_BLOCK", 1000)
    monkeypatch.setattr(readers, "_WHOLE", 5000)
    found = list(readers.read_file(path, "book.txt", "text", readers.Counter()))
    assert len(whole) == 1 and len(found) > 10
    assert "".join(d.text for d in found) == text == whole[0].text
    assert all(d.text.endswith("\n") for d in found)
    assert [d.name for d in found] == [f"book.txt:{i}" for i in range(len(found))]


@pytest.mark.parametrize("space", [" ", ""])
def test_a_text_of_one_line_is_cut_alike_however_it_is_read(monkeypatch, space):
    text = space.join(f"word{i}" for i in range(2000)) + "\nshort\n"
    monkeypatch.setattr(readers, "_BLOCK", 500)

    def cut(step):
        parts = (text[i : i + step] for i in range(0, len(text), step))
        return [d.text for d in readers.blocks("t", parts)]

    whole = cut(len(text))
    assert "".join(whole) == text and len(whole) > 5
    assert cut(1) == cut(333) == whole
    assert all(t[-1].isspace() for t in whole) or not space


def test_a_lone_file_of_one_line_has_both_splits(tmp_path):
    (tmp_path / "text8.txt").write_text("anarchism originated as a term of abuse " * 99)
    assert len(everything(tmp_path / "text8.txt")) > 5


def test_a_folder_named_like_a_table_is_read_by_its_files_own_names(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.jsonl" / "a.txt").write_text("no JSON")
    (tmp_path / "x.jsonl" / "b.txt").write_text("nor this")
    assert set(everything(tmp_path)) == {"x.jsonl/a.txt", "x.jsonl/b.txt"}


def test_an_empty_compressed_file_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is empty, which no compressed file is"):
        everything(tmp_path / "a.jsonl.gz")


def test_what_has_no_text_is_counted(tmp_path):
    rows = [{"text": "a"}, {"text": " "}, {"text": None}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.txt").write_text("\n")
    documents = Documents(TextConfig(source=str(tmp_path)), "train")
    for _ in range(2):  # a second reading does not count twice
        assert len(list(documents)) == 1
        assert documents.left_out == {"empty_documents": 3}
    assert everything(tmp_path) == {"a.jsonl:1": "a", "a.jsonl:4": "b"}


def test_another_field_and_the_fields_that_there_are(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("body"))
    assert sorted(everything(tmp_path / "a.jsonl", field="body").values()) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r'a\.jsonl, line 1: .* "text" .*; fields: id, body'):
        everything(tmp_path / "a.jsonl")


def test_json_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines() + "[" * 200_000 + "]" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 31 is too deeply nested .*; mend or rem"):
        everything(tmp_path / "a.jsonl")


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_truncated_gz_is_named(tmp_path, cut):
    raw = gzip.compress(lines().encode())
    (tmp_path / "a.jsonl.gz").write_bytes(raw[: int(len(raw) * cut)])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is truncated"):
        everything(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is damaged or not what its name says"):
        everything(tmp_path / "a.jsonl.gz")


def test_binary_files_are_named_with_the_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\0def")
    with pytest.raises(ValueError, match=r"a\.txt is binary, not text: NUL byte at byte offset 3"):
        everything(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"cut off in a character \xe2\x82")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text: byte 0xe2 at byte offset 23"):
        everything(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2 is not UTF-8 .* byte offset 24"):
        everything(tmp_path)


@pytest.mark.parametrize(
    "name, package", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), (None, "datasets")]
)
def test_a_missing_package_is_one_line_that_names_it(tmp_path, monkeypatch, name, package):
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    source = "hf:some/data"
    if name:
        (tmp_path / name).write_bytes(b"x")
        source = str(tmp_path / name)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install") as error:
        everything(source)
    assert "\n" not in str(error.value)


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    raw = lines().encode()
    packed = [zstandard.ZstdCompressor().compress(part) for part in (raw[:300], raw[300:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(packed))
    assert sorted(everything(tmp_path / "a.jsonl.zst").values()) == sorted(TEXTS)
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(packed)[:-9])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is truncated"):
        everything(tmp_path / "a.jsonl.zst")
    (tmp_path / "a.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is damaged"):
        everything(tmp_path / "a.jsonl.zst")


def test_zst_with_a_long_window(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    small = {"hash_log": 6, "chain_log": 6, "strategy": zstandard.STRATEGY_FAST}
    long = zstandard.ZstdCompressionParameters(window_log=28, **small)  # `zstd --long=28`
    stream = zstandard.ZstdCompressor(compression_params=long).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(lines().encode()) + stream.flush())
    assert sorted(everything(tmp_path / "a.jsonl.zst").values()) == sorted(TEXTS)


def write_table(path, **columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_table(path, text=[*TEXTS, None, ""], n=list(range(len(TEXTS) + 2)))
    documents = Documents(TextConfig(source=str(path)), "train")
    names = [d.name for d in documents]
    assert names == sorted(names, key=lambda n: int(n.split(":")[1]))
    assert documents.left_out == {"empty_documents": 2}
    assert sorted(everything(path).values()) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"no column 'body' \(Text.field\); it has text, n"):
        everything(path, field="body")
    with pytest.raises(ValueError, match=r"column 'n' .* holds int64, not strings"):
        everything(path, field="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is no sound parquet file"):
        everything(path)


def test_a_category_of_strings_is_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path, index = tmp_path / "a.PARQUET", pyarrow.array([0, 1, None, 0, 1] * 3, pyarrow.int8())
    strings = pyarrow.DictionaryArray.from_arrays(index, TEXTS[:2])
    raw = pyarrow.DictionaryArray.from_arrays(index, [b"3", b"4"])
    write_table(path, text=strings, raw=raw)
    assert list(everything(path).values()).count(TEXTS[0]) == 6 and len(everything(path)) == 12
    with pytest.raises(ValueError, match=r"column 'raw' .* holds dictionary<.*binary.*, not str"):
        everything(path, field="raw")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return pytest.importorskip("datasets")


@pytest.mark.filterwarnings("ignore")
def test_datasets_are_streamed(tmp_path, offline):
    folder = tmp_path / "data"
    folder.mkdir()
    write_table(folder / "a.parquet", text=TEXTS, n=list(range(len(TEXTS))))
    found = everything(f"hf:{folder}", split="train")
    assert sorted(found.values()) == sorted(TEXTS)
    assert all(re.fullmatch(rf"{folder}/train:\d+", name) for name in found)
    cfg = TextConfig(source=f"hf:{folder}", max_documents=3)
    assert len(read_documents(cfg, "train")) == 3
    with pytest.raises(ValueError, match=r"no column 'body' \(Text.field\); it has text, n"):
        everything(f"hf:{folder}", field="body")
    with pytest.raises(ValueError, match=r"Text.source = 'hf:.*data'.*nosplit"):
        everything(f"hf:{folder}", split="nosplit")
    with pytest.raises(FileNotFoundError, match=r"Text\.source = 'hf:nobody/nothing'"):
        everything("hf:nobody/nothing")


def test_reading_order_stops_at_the_limit(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(lines() + "not json\n")
    cfg = TextConfig(source=str(source), take="first", max_documents=4, held_out_percent=30)
    taken = Documents(cfg, "train")
    names = [d.name for d in taken]
    every = [f"a.jsonl:{i + 1}" for i in range(len(TEXTS))]
    kept = [name for name in every if hash_fraction(name) >= 0.3]
    assert names == kept[:4] and taken.left_out == {"documents_over_limit": 1}
    size = sum(len(TEXTS[every.index(name)].encode()) for name in kept[:6])
    sized = TextConfig(source=str(source), take="first", max_bytes=size, held_out_percent=30)
    assert [d.name for d in read_documents(sized, "train")] == kept[:6]
    small = TextConfig(source=str(source), take="first", max_bytes=3)
    with pytest.raises(ValueError, match=r"Text.max_bytes = 3 .* first document .* at least \d\d"):
        read_documents(small, "train")
    with pytest.raises(ValueError, match="line 31 is not JSON"):  # without a limit it gets there
        read_documents(TextConfig(source=str(source), take="first"), "train")


def test_a_corpus_larger_than_memory_is_read_twice_with_the_same_result(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(lines())
    whole = everything(tmp_path / "a.jsonl", max_bytes=400)
    monkeypatch.setattr(splits, "_IN_MEMORY", 50)
    assert everything(tmp_path / "a.jsonl", max_bytes=400) == whole
    documents = Documents(TextConfig(source=str(tmp_path / "a.jsonl")), "train")
    read, passes = documents.read, []

    def changing(left_out):
        if passes:
            (tmp_path / "a.jsonl").write_text(lines().replace("\n", "\n\n", 3))
        passes.append(1)
        return read(left_out)

    monkeypatch.setattr(documents, "read", changing)
    with pytest.raises(ValueError, match="changed while it was being read"):
        list(documents)


def test_a_limit_on_documents_samples_all_of_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines())
    cfg = TextConfig(source=str(tmp_path / "a.jsonl"), max_documents=5, held_out_percent=20)
    taken = Documents(cfg, "train")
    numbers = [int(d.name.split(":")[1]) for d in taken]
    assert len(numbers) == 5 and numbers == sorted(numbers) and max(numbers) > 8
    assert taken.left_out["documents_over_limit"] > 10


def test_threads_open_arrays_at_once(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6.0).reshape(2, 3))

    def yields(*_):
        time.sleep(0)  # as callbacks of jax let another thread run while garbage is collected

    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(yields)
    try:
        gc.set_threshold(5)
        sys.setswitchinterval(1e-6)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            opened = list(pool.map(readers.open_npy, [path] * 1000))
    finally:
        gc.callbacks.remove(yields)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
    assert all(array.shape == (2, 3) for array in opened)
