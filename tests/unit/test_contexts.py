"""The cache of contexts: equal to what it stands for, never out of date, never half-written."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest

from saejax.data import bpe, contexts, progress
from saejax.data.contexts import load_contexts
from saejax.data.corpus import TextConfig
from saejax.data.token_arrays import TokensConfig
from saejax.data.tokens import TokenDocument

TOKENIZER = bpe.Tokenizer(
    {s: i for i, s in enumerate(bpe.byte_symbols())}, [], {bpe.END_OF_TEXT: 256}
)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text number {i} é " * (i + 3))
    return folder


def assert_equal(one, other):
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right and type(left) is type(right), field.name


def never(*args, **kwargs):
    raise AssertionError("tokenised again")


def test_a_kept_entry_equals_what_it_stands_for(source, tmp_path, monkeypatch):
    cfg = TextConfig(source=str(source), tails="pad", min_tail=3, max_documents=12)
    plain = load_contexts(cfg, "train", TOKENIZER, 16)
    monkeypatch.setattr(contexts.pack_tokens.__globals__["_Packer"], "add", watched := counting())
    kept = dataclasses.replace(cfg, cache=str(tmp_path / "cache"))
    first = load_contexts(kept, "train", TOKENIZER, 16)
    assert watched.calls == 12 and isinstance(first.tokens, np.memmap)
    monkeypatch.setattr(contexts, "pack_tokens", never)
    second = load_contexts(kept, "train", TOKENIZER, 16)
    by_argument = load_contexts(cfg, "train", TOKENIZER, 16, cache=tmp_path / "cache")
    for other in (first, second, by_argument):
        assert_equal(plain, other)
    assert not second.tokens.flags.writeable
    assert [p.name[0] != "." for p in (tmp_path / "cache").iterdir()] == [True]


def counting():
    from saejax.data.tokens import _Packer

    add = _Packer.add

    def watched(self, document):
        watched.calls += 1
        return add(self, document)

    watched.calls = 0
    return watched


def test_whatever_fixes_the_contexts_is_part_of_the_key(source, tmp_path):
    cfg = TextConfig(source=str(source), cache=str(tmp_path / "cache"))
    other = bpe.Tokenizer.load(os.path.dirname(bpe.__file__) + "/../subjects/embedded")
    load_contexts(cfg, "train", TOKENIZER, 16)

    def entries():
        return len(list((tmp_path / "cache").iterdir()))

    variants = [
        lambda: load_contexts(cfg, "held_out", TOKENIZER, 16),
        lambda: load_contexts(cfg, "train", TOKENIZER, 17),
        lambda: load_contexts(cfg, "train", other, 16),
        lambda: load_contexts(dataclasses.replace(cfg, bos="context"), "train", TOKENIZER, 16),
        lambda: load_contexts(dataclasses.replace(cfg, max_bytes=5000), "train", TOKENIZER, 16),
    ]
    for number, variant in enumerate(variants, 2):
        variant()
        assert entries() == number
    load_contexts(dataclasses.replace(cfg, bos="document"), "train", TOKENIZER, 16)
    assert entries() == len(variants) + 1, "what 'auto' means is the same entry as itself"


def test_a_changed_source_is_tokenised_again(source, tmp_path):
    cfg = TextConfig(source=str(source), cache=str(tmp_path / "cache"), held_out_percent=0)
    before = load_contexts(cfg, "train", TOKENIZER, 16)
    file = source / "7.txt"
    stat = file.stat()
    file.write_text(file.read_text().replace("text", "TEXT"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # the same size
    after = load_contexts(cfg, "train", TOKENIZER, 16)
    assert after.fingerprint != before.fingerprint
    (source / "7.txt").unlink()
    assert "7.txt" not in load_contexts(cfg, "train", TOKENIZER, 16).names


@pytest.mark.parametrize("name", ["tokens.npy", "names.json", "contexts.json", "keep.npy"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_named(source, tmp_path, name, how):
    cfg = TextConfig(source=str(source), cache=str(tmp_path / "cache"))
    load_contexts(cfg, "train", TOKENIZER, 16)
    (entry,) = (tmp_path / "cache").iterdir()
    raw = bytearray((entry / name).read_bytes())
    raw[len(raw) * 2 // 3] ^= 4
    if how == "remove":
        (entry / name).unlink()
    else:
        (entry / name).write_bytes(raw if how == "flip" else raw[:-5])
    with pytest.raises(ValueError, match=f"{name} is (missing or )?damaged; delete this folder"):
        load_contexts(cfg, "train", TOKENIZER, 16)


def test_a_failed_run_leaves_nothing(source, tmp_path):
    (source / "9.txt").write_bytes(b"\xff")
    cfg = TextConfig(source=str(source), cache=str(tmp_path / "cache"), take="first")
    with pytest.raises(ValueError, match=r"9\.txt is not UTF-8"):
        load_contexts(cfg, "train", TOKENIZER, 16)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_told_with_the_setting(source, tmp_path, monkeypatch):
    cfg = TextConfig(source=str(source), cache=str(tmp_path / "cache"))

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(contexts._FileSink, "append", full)
    with pytest.raises(OSError, match=r"Text.cache: no space left for contexts in .*cache; free"):
        load_contexts(cfg, "train", TOKENIZER, 16)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("label", ["Text", "Tokens"])
@pytest.mark.parametrize("where", ["file", "file/below", "locked"])
def test_a_cache_that_cannot_be_is_told_with_the_setting(
    source, tmp_path, monkeypatch, label, where
):
    (tmp_path / "file").write_text("no folder")
    np.save(tmp_path / "a.npy", np.zeros((40, 16), int))
    cache = str(tmp_path / where)
    if where == "locked":  # for root no folder is

        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    cfg = TextConfig(source=str(source), cache=cache)
    if label == "Tokens":
        cfg = TokensConfig(source=str(tmp_path / "a.npy"), cache=cache)
    told = rf"{label}\.cache = '{cache}' is no folder that can be written \(.*\); give another, or"
    with pytest.raises(OSError, match=told):
        load_contexts(cfg, "train", TOKENIZER, 16)


def test_of_documents_too_short_the_bound_is_told(source, tmp_path):
    cfg = TextConfig(source=str(source), tails="pad", min_tail=900)
    with pytest.raises(ValueError, match=r"min_tail = 900: none of the \d+ .*; give .* min_tail$"):
        load_contexts(cfg, "train", TOKENIZER, 1000)
    lone = tmp_path / "lone.txt"
    lone.write_text("a line of this\n" * 60)
    for fields, bound in (
        ({}, "context_length = 100"),
        ({"tails": "pad", "min_tail": 90}, "min_t"),
    ):
        cfg = TextConfig(source=str(lone), **fields)
        told = rf"{bound}.*; Text\.source = '{lone}' is one file, cut into pieces"
        with pytest.raises(ValueError, match=told):
            load_contexts(cfg, "train", TOKENIZER, 100)


def test_of_two_runs_the_later_takes_what_is_there(source, tmp_path, monkeypatch):
    cfg = TextConfig(source=str(source), cache=str(tmp_path / "cache"))
    publish = contexts._publish

    def slower(building, entry):
        monkeypatch.setattr(contexts, "_publish", publish)
        load_contexts(cfg, "train", TOKENIZER, 16)  # another run is done meanwhile
        publish(building, entry)

    monkeypatch.setattr(contexts, "_publish", slower)
    found = load_contexts(cfg, "train", TOKENIZER, 16)
    assert len(found.tokens) and len(list((tmp_path / "cache").iterdir())) == 1


def test_python_and_arrays_are_kept_too(tmp_path):
    cache = str(tmp_path / "cache")
    cfg = TextConfig(max_bytes=20_000, cache=cache)
    assert_equal(*(load_contexts(cfg, "held_out", TOKENIZER, 64) for _ in range(2)))
    np.save(tmp_path / "a.npy", np.arange(800).reshape(20, 40) % 256)
    ids = TokensConfig(source=str(tmp_path / "a.npy"), cache=cache)
    assert_equal(*(load_contexts(ids, "train", TOKENIZER, 8) for _ in range(2)))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_dataset_without_a_revision_is_not_kept(tmp_path):
    cfg = TextConfig(source="hf:some/data", cache=str(tmp_path))
    with pytest.raises(ValueError, match=r"set Text\.revision to a commit"):
        load_contexts(cfg, "train", TOKENIZER, 16)


def test_the_seal_covers_the_description(source, tmp_path):
    cfg = TextConfig(source=str(source), cache=str(tmp_path / "cache"))
    load_contexts(cfg, "train", TOKENIZER, 16)
    (meta,) = (tmp_path / "cache").glob("*/contexts.json")
    content = json.loads(meta.read_text())
    content["plain"]["bytes_total"] += 1
    meta.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"contexts\.json is damaged"):
        load_contexts(cfg, "train", TOKENIZER, 16)


def test_a_line_every_few_seconds_says_how_far_reading_is():
    now, lines = [100.0], []
    seen = progress.Progress(lines.append, "Text", clock=lambda: now[0])
    for _ in seen.reading(range(25)):
        now[0] += 3.0
    assert lines == [f"Text: {n} documents read" for n in (5, 9, 13, 17, 21, 25)]
    ids = [TokenDocument(str(i), np.zeros(50, np.uint16), 200_000, b"") for i in range(8)]
    lines.clear()
    for _ in seen.packing(seen.reading(ids)):
        now[0] += 5.0
    # another pass counts anew
    assert lines[0] == "Text: 2 documents read, 2 packed, 0.4 MB of text, 100 tokens, 10 a second"
    assert lines[3] == "Text: 8 documents read, 8 packed, 1.6 MB of text, 400 tokens, 10 a second"
    assert len(lines) == 4


def test_reading_and_packing_are_told_of(source, tmp_path, monkeypatch):
    cfg, lines = TextConfig(source=str(source)), []
    load_contexts(cfg, "train", TOKENIZER, 16, log=lines.append)
    assert lines == []  # it takes no time
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    told = load_contexts(cfg, "train", TOKENIZER, 16, log=lines.append)
    assert lines[0] == f"Text.source = {str(source)!r}, train: 1 documents read"
    text = sum(told.document_bytes) / 1e6
    packed = f"{len(told.names)} packed, {text:,.1f} MB of text" if text >= 0.05 else "packed"
    assert packed in lines[-1] and "tokens, " in lines[-1]
    np.save(tmp_path / "a.npy", np.zeros((40, 16), int))
    ids = TokensConfig(source=str(tmp_path / "a.npy"))
    lines.clear()
    load_contexts(ids, "train", TOKENIZER, 8, log=lines.append)
    assert lines[0] == f"Tokens.source = {ids.source!r}, train: 1 documents read"
    assert "40 documents read" in lines[-1] and "MB" not in lines[-1]


def test_a_dataset_read_to_its_end_is_told_before(monkeypatch):
    opened = []

    def rows(*args):
        opened.append(len(lines))
        return (f"some words of text number {i} " * 9 for i in range(200))

    monkeypatch.setattr("saejax.data.readers.hub_rows", rows)
    told = "Text.source = 'hf:some/data' will be read to its end, however large it is: "
    for fields, expected in (
        ({}, [f"{told}Text.max_bytes (or Text.max_documents) sets a limit"]),
        ({"max_bytes": 9000}, []),
        ({"max_documents": 9}, []),
        (
            {"max_bytes": 9000, "take": "sample"},
            [f"{told}Text.take = 'first' reads no further than Text.max_bytes"],
        ),
    ):
        lines = []
        cfg = TextConfig(source="hf:some/data", **fields)
        load_contexts(cfg, "train", TOKENIZER, 16, log=lines.append)
        assert lines == expected
        assert opened[0] == len(expected)  # before a row was asked for
        opened.clear()
    load_contexts(TextConfig(source="hf:some/data"), "train", TOKENIZER, 16)  # no log


def test_special_tokens_are_kept_where_asked_for(source, tmp_path):
    cfg = TextConfig(source=str(source), tails="pad", min_tail=3, bos="context")
    kept = dataclasses.replace(cfg, cache=str(tmp_path / "cache"))
    plain, special = (
        load_contexts(kept, "train", TOKENIZER, 16, keep_special=keep) for keep in (False, True)
    )
    assert not plain.keep[:, 0].any() and special.keep[:, 0].all()
    real = np.arange(16) < special.length[:, None]
    assert not real.all()
    np.testing.assert_array_equal(special.keep, real)
    np.testing.assert_array_equal(special.tokens, plain.tokens)
    assert special.fingerprint != plain.fingerprint
    assert_equal(special, load_contexts(cfg, "train", TOKENIZER, 16, keep_special=True))
