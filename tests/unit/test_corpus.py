"""Documents: where they come from, how they are split, and how bad input is refused."""

import gzip
import json
import os
import re
import sysconfig
from itertools import chain

import pytest

from saejax.data import corpus, splits
from saejax.data.corpus import TextConfig, read_documents


def tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def both(cfg):
    return read_documents(cfg, "train"), read_documents(cfg, "held_out")


def test_the_python_library_splits_into_disjoint_parts():
    train, held = both(TextConfig())
    names = [d.name for d in train], [d.name for d in held]
    assert not set(names[0]) & set(names[1])
    assert names == (sorted(names[0]), sorted(names[1]))
    everything = {d.name: d.text for d in corpus.python_documents()}
    assert {d.name: d.text for d in [*train, *held]} == everything
    assert 0.02 < len(held) / len(everything) < 0.09
    assert sum(len(t) for t in everything.values()) > 5e6
    folders = {part for name in everything for part in name.split("/")[:-1]}
    assert not folders & corpus.SKIPPED_FOLDERS


def test_a_name_is_held_out_by_its_hash_alone():
    # The embedded subject was trained with these held out; another rule would leak.
    assert splits.hash_fraction("sched.py") < 0.05 <= splits.hash_fraction("ast.py")
    _, few = both(TextConfig(held_out_percent=1))
    _, more = both(TextConfig(held_out_percent=5))
    assert {d.name for d in few} < {d.name for d in more}


def test_max_bytes_keeps_whole_documents_of_the_same_split():
    cfg = TextConfig(max_bytes=200_000)
    full = {d.name: d.text for d in read_documents(TextConfig(), "train")}
    some = read_documents(cfg, "train")
    assert 150_000 < sum(len(d.text.encode()) for d in some) <= 200_000
    assert all(full[d.name] == d.text for d in some)
    assert len({d.name[0] for d in some}) > 5, "a sample, not the head of the alphabet"
    with pytest.raises(ValueError, match=r"Text.max_bytes = 10 .* at least \d+"):
        read_documents(TextConfig(max_bytes=10), "train")


def test_a_library_without_source_falls_back_to_the_dependencies(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = corpus.python_documents()
    assert {d.name.split("/")[0] for d in documents} >= {"jax", "numpy"}
    monkeypatch.setattr(corpus, "_FALLBACK_PACKAGES", ("no_such_package_at_all",))
    with pytest.raises(FileNotFoundError, match=r"Text\.source = 'python'"):
        corpus.python_documents()


def test_a_folder_is_read_sorted_and_without_hidden_files(tmp_path):
    lines = [json.dumps({"text": f"line {i}"}) for i in range(3)]
    source = tree(
        tmp_path,
        {
            "b.txt": "second",
            "a/x.md": "\ufefffirst\r\nand more",
            "a/empty.py": " \n",
            "c.jsonl": "\n".join(lines) + "\n\n",
            "d.bin": b"\xff\xfe",
            ".hidden/e.txt": b"\xff",
            "__pycache__/f.py": "no",
        },
    )
    documents = chain.from_iterable(both(TextConfig(source=source, held_out_percent=40)))
    assert {d.name: d.text for d in documents} == {
        "a/x.md": "first\nand more",
        "b.txt": "second",
        "c.jsonl:1": "line 0",
        "c.jsonl:2": "line 1",
        "c.jsonl:3": "line 2",
    }


def names_of(source):
    return {d.name for d in read_documents(TextConfig(source=source, held_out_percent=0), "train")}


def test_linked_folders_are_read_once_and_a_loop_ends(tmp_path):
    source = tree(tmp_path / "s", {"sub/a.txt": "one", "sub/.hidden/b.txt": "two", "c.txt": "3"})
    elsewhere = tree(
        tmp_path / "x", {"deep/d.txt": "four", "e.txt": "five", "__pycache__/f.py": "6"}
    )
    links = {"a": "s/sub", "link": "x", "more": "x/deep", "seen": "s/sub/.hidden", "up": "s"}
    for name, target in links.items():
        (tmp_path / "s" / name).symlink_to(tmp_path / target, target_is_directory=True)
    (tmp_path / "x" / "back").symlink_to("../s")
    names = {"c.txt", "sub/a.txt", "link/deep/d.txt", "link/e.txt", "seen/b.txt"}
    assert names_of(source) == names
    (tmp_path / "entry").symlink_to(source)
    assert names_of(str(tmp_path / "entry")) == names
    assert names_of(elsewhere) == {
        *("deep/d.txt", "e.txt", "back/c.txt", "back/sub/a.txt", "back/seen/b.txt")
    }


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, name):
    source = tree(tmp_path / "s", {"b.txt": "text"})
    (tmp_path / "s" / "other.bin").symlink_to("gone")  # would not be read
    assert names_of(source) == {"b.txt"}
    (tmp_path / "s" / name).symlink_to("gone")
    told = (
        rf"Text\.source = '{source}': the link '{source}/{name}' leads to 'gone', .*; mend or rem"
    )
    with pytest.raises(FileNotFoundError, match=told):
        names_of(source)


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    source = tree(tmp_path, {"b.txt": "text"})
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system has names of UTF-8 only")
    told = r"Text\.source = .*: the name 'caf\\udce9\.txt' of a file in it is not UTF-8; rename"
    with pytest.raises(ValueError, match=told):
        names_of(source)


def test_endings_may_be_in_capitals(tmp_path):
    line = json.dumps({"text": "line"}).encode()
    packed = gzip.compress(line + b"\n" + line)
    source = tree(tmp_path, {"UP.TXT": "one", "L.Jsonl": line, "Z.JSONL.GZ": packed})
    names = {"UP.TXT", "L.Jsonl:1", "Z.JSONL.GZ:1", "Z.JSONL.GZ:2"}
    assert names_of(source) == names
    assert names_of(f"{source}/Z.JSONL.GZ") == {"Z.JSONL.GZ:1", "Z.JSONL.GZ:2"}


@pytest.mark.parametrize("percent", [0.001, 50, 99.9])
def test_two_documents_always_give_both_splits(tmp_path, percent):
    source = tree(tmp_path, {"a.txt": "one", "b.txt": "two"})
    train, held = both(TextConfig(source=source, held_out_percent=percent))
    assert len(train) == len(held) == 1


def test_a_lone_file_is_cut_at_line_ends_so_that_it_splits(tmp_path):
    text = "".join(f"line {i} of a book\n" for i in range(5000))
    source = tree(tmp_path, {"book.txt": text}) + "/book.txt"
    train, held = both(TextConfig(source=source))
    parts = {d.name: d.text for d in [*train, *held]}
    ordered = sorted(parts, key=lambda name: int(name.split(":")[1]))
    assert "".join(parts[name] for name in ordered) == text
    assert all(part.endswith("\n") for part in parts.values()) and len(parts) > 5


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    source = tree(tmp_path, {"good.txt": "fine", "sub/bad.txt": "abcdé".encode("latin1")})
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8 .* offset 4; convert"):
        read_documents(TextConfig(source=source), "train")


def test_python_files_may_declare_an_encoding(tmp_path):
    declared = "# -*- coding: latin-1 -*-\nx = 'é'\r\n".encode("latin1")
    tree(tmp_path, {"a.py": declared, "b.py": b"x = '\xff'\n"})
    assert corpus.read_python(tmp_path / "a.py").endswith("x = 'é'\n")
    with pytest.raises(ValueError, match=r"b\.py is not Python source"):
        corpus.read_python(tmp_path / "b.py")


def test_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_documents(TextConfig(source=str(tmp_path / "nowhere")), "train")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(TextConfig(source=tree(tmp_path / "e", {"a.txt": " \n"})), "train")
    with pytest.raises(ValueError, match="a file must end in"):
        read_documents(TextConfig(source=tree(tmp_path / "p", {"a.pdf": "x"}) + "/a.pdf"), "train")
    lone = tree(tmp_path / "one", {"a.txt": "only one document"})
    with pytest.raises(ValueError, match="leaves the held_out split empty"):
        read_documents(TextConfig(source=lone), "held_out")
    with pytest.raises(ValueError, match=r"split = 'test'"):
        read_documents(TextConfig(source=lone), "test")


@pytest.mark.parametrize("line", ['{"text": 3}', '["text"]', '{"body": "x"}', "{"])
def test_a_bad_jsonl_line_is_named(tmp_path, line):
    source = tree(tmp_path, {"a.jsonl": '{"text": "x"}\n' + line + "\n"}) + "/a.jsonl"
    with pytest.raises(ValueError, match=re.escape("a.jsonl, line 2")):
        read_documents(TextConfig(source=source), "train")


@pytest.mark.parametrize(
    "field, value", [("source", ""), ("held_out_percent", 100), ("max_bytes", 0)]
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"Text.{field}"):
        TextConfig(**{field: value})
