"""Activations of other programs: every format is read as it is written, what is unsound refused.

The peers' files are made here by hand, as their own writers make them; where PyTorch or `datasets`
is installed, those write them too.
"""

import json
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from saejax.data.foreign import lists, torch_files
from saejax.data.foreign.formats import detect, open_foreign, state_of
from saejax.data.foreign.interface import Wanted, codes_of_kept
from saejax.data.foreign.reading import Reader

BF16 = ml_dtypes.bfloat16
D, T = 8, 5


def acts(n, dtype=np.float32, seed=0, shape=(T, D)):
    return np.random.default_rng(seed).normal(0, 2, (n, *shape)).astype(dtype)


def ids(n, seed=1, length=T):
    return np.random.default_rng(seed).integers(3, 90, (n, length))


def bits(array):
    return np.asarray(array).astype(BF16).view(np.uint16)


def opened(path, field=None, tokens=None, format=None):
    return open_foreign(path, Wanted(field=field, tokens=tokens), format)


def everything(foreign):
    reader = Reader(foreign.parts)
    return reader.gather(np.arange(reader.count), 0)


def check(path, expected, ids=None, kind=None, **named):
    """A source holds these contexts; any of them can be asked for in any order."""
    format, foreign = opened(path, **named)
    assert kind is None or format == kind
    found = everything(foreign)
    np.testing.assert_array_equal(bits(found.acts), bits(expected))
    if ids is None:
        assert not foreign.parts[0].tokens and not found.tokens.any()
    else:
        np.testing.assert_array_equal(found.tokens, ids)
    some = np.random.default_rng(3).permutation(len(expected))[: len(expected) // 2]
    part = Reader(foreign.parts).gather(some, 0)
    np.testing.assert_array_equal(bits(part.acts), bits(expected[some]))
    np.testing.assert_array_equal(part.origin[:, 0], some)
    return foreign, found


def torch_save(path, content):
    """What torch.save writes of tensors in dicts and plain values, without PyTorch."""
    storages, names = [], {
        "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
        "bfloat16": "BFloat16Storage", "int64": "LongStorage", "bool": "BoolStorage",
    }  # fmt: skip

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def integer(value):
        return b"J" + struct.pack("<i", value)

    def numbers(values):
        return b"(" + b"".join(map(integer, values)) + b"t"

    def item(value):
        if isinstance(value, str):
            return text(value)
        if isinstance(value, int):
            return integer(value)
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        if isinstance(value, dict):
            inside = b"".join(text(k) + item(v) for k, v in value.items())
            return b"}q\x00(" + inside + b"u"
        storages.append(np.ascontiguousarray(value))
        key, strides = str(len(storages) - 1), [s // value.itemsize for s in storages[-1].strides]
        stored = b"(" + text("storage") + f"ctorch\n{names[value.dtype.name]}\n".encode()
        stored += text(key) + text("cpu") + integer(value.size) + b"tQ"
        arguments = stored + integer(0) + numbers(value.shape) + numbers(strides) + b"\x89"
        arguments += b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"

    code = b"\x80\x02" + item(content) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", code)
        archive.writestr("a/byteorder", "little")
        for key, array in enumerate(storages):
            archive.writestr(f"a/data/{key}", array.tobytes())


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64])
def test_npy_folders_in_the_order_of_their_numbers(tmp_path, dtype):
    x = acts(33, dtype)
    for i, part in enumerate(np.split(x, [7, 20])):
        np.save(tmp_path / f"part{[2, 9, 10][i]}.npy", part)
    foreign, found = check(tmp_path, x, kind="npy")
    assert [part.name for part in foreign.parts] == ["part2.npy", "part9.npy", "part10.npy"]
    assert foreign.parts[0].dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(found.origin[8], [8, 1, 5])  # the second of the second file


def test_rows_are_contexts_of_one_token(tmp_path):
    x = acts(12, shape=(D,))
    np.save(tmp_path / "rows.npy", x)
    foreign, found = check(tmp_path / "rows.npy", x[:, None])
    assert foreign.parts[0].shape == (12, 1, D)
    np.testing.assert_array_equal(found.origin[5], [5, 0, 5])


def test_safetensors_by_name_with_their_tokens(tmp_path):
    x, tokens = acts(9, BF16), ids(9)
    for i, part in enumerate((slice(0, 4), slice(4, 9))):
        safetensors.numpy.save_file(
            {"resid": x[part], "input_ids": tokens[part], "mean": np.ones(D, np.float32)},
            tmp_path / f"{i}.safetensors",
            {"note": "any"},
        )
    check(tmp_path, x, tokens, kind="safetensors")
    check(tmp_path, x, tokens, field="resid", tokens="input_ids")
    with pytest.raises(
        ValueError, match=r"0\.safetensors has no 'act' \(--field\); it has .*resid"
    ):
        opened(tmp_path, field="act")
    with pytest.raises(ValueError, match="'mean' has shape"):
        opened(tmp_path, field="mean")
    with pytest.raises(ValueError, match=r"input_ids.* is of type int64: activations must be"):
        opened(tmp_path, field="input_ids")


def test_types_that_are_not_supported_are_told(tmp_path):
    path, values = tmp_path / "x.safetensors", bytes(2 * D)
    header = {"h": {"dtype": "F8_E4M3", "shape": [2, D], "data_offsets": [0, 2 * D]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    told = r"holds h F8_E4M3\[2, 8\]; none of them can be activations: give float16, bfloat16, "
    with pytest.raises(ValueError, match=told):
        opened(path)
    with pytest.raises(ValueError, match=r"'h' is of type F8_E4M3: activations must be float16, "):
        opened(path, field="h")
    with pytest.raises(ValueError, match=r"has no 'x' \(--field\); it has h F8_E4M3"):
        opened(path, field="x")
    header["tokens"], header["h"] = header["h"], {
        "dtype": "F16", "shape": [1, D], "data_offsets": [0, 2 * D],
    }  # fmt: skip
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    with pytest.raises(ValueError, match="'tokens' is of type F8_E4M3: token ids must be integers"):
        opened(path)
    path.rename(tmp_path / "chunk-0.safetensors")
    header = {
        name.replace("h", "activation").replace("tokens", "mask"): e for name, e in header.items()
    }
    text = json.dumps(header).encode()
    (tmp_path / "chunk-0.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + values)
    with pytest.raises(ValueError, match="'mask' is of type F8_E4M3: give BOOL"):
        opened(tmp_path, format="llamascopium")


def test_a_link_to_nothing_is_not_passed_over(tmp_path):
    np.save(tmp_path / "0.npy", acts(2))
    (tmp_path / "1.npy").symlink_to(tmp_path / "away.npy")
    with pytest.raises(
        FileNotFoundError, match=r"1\.npy is a link to .*away\.npy, which is missing"
    ):
        opened(tmp_path)
    (tmp_path / "chunk-1.txt").symlink_to("nowhere")  # of no format
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other/away.npy", acts(3))
    (tmp_path / "1.npy").unlink()
    (tmp_path / "1.npy").symlink_to("other/away.npy")
    check(tmp_path, np.concatenate([acts(2), acts(3)]))


def test_which_tensor_is_meant_must_be_clear(tmp_path):
    safetensors.numpy.save_file({"a": acts(2), "b": acts(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"a float32\[2, 5, 8\], b .*more than one.*--field"):
        opened(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64])
def test_torch_files_without_torch(tmp_path, dtype):
    x, tokens = acts(6, dtype), ids(6)
    torch_save(tmp_path / "x.pt", {"meta": ["a", {"b": 7}], "h": x, "tokens": tokens})
    check(tmp_path / "x.pt", x, tokens, kind="torch")
    assert torch_files.load(tmp_path / "x.pt")["meta"] == ["a", {"b": 7}]
    torch_save(tmp_path / "x.pt", x[:, 0])
    check(tmp_path / "x.pt", x[:, :1], kind="torch")


def test_torch_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.randn(6, T, D).to(torch.bfloat16)
    base = torch.arange(6 * T * 2).reshape(6, T * 2)
    content = {"h": x, "tokens": base[:, T:], "t": x.transpose(1, 2), "n": 3, "f": 1.5, "o": None}
    torch.save(content, tmp_path / "x.pt")
    check(tmp_path / "x.pt", x.float().numpy(), base[:, T:].numpy(), field="h")
    loaded = torch_files.load(tmp_path / "x.pt")
    np.testing.assert_array_equal(bits(loaded["t"]), bits(x.transpose(1, 2).float().numpy()))
    assert (loaded["n"], loaded["f"], loaded["o"]) == (3, 1.5, None)
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "state.pt")
    assert set(torch_files.open_tensors(tmp_path / "state.pt")) == {"weight", "bias"}
    torch.save(torch.nn.Linear(3, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"it names torch\.nn\.modules\.linear\.Linear"):
        torch_files.load(tmp_path / "module.pt")


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_is_never_run(tmp_path, capsys):
    for protocol in (2, 4):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps({"h": Evil()}, protocol))
        with pytest.raises(ValueError, match=r"x\.pt: it.*only tensors in plain dicts"):
            opened(tmp_path)
        assert capsys.readouterr().out == ""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"h": print}, 2))
    with pytest.raises(ValueError, match=r"it names __builtin__\.print; only tensors"):
        opened(tmp_path)


def test_a_tensor_cannot_reach_beyond_its_file(tmp_path):
    torch_save(tmp_path / "x.pt", acts(2))
    data = (tmp_path / "x.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert data.count(struct.pack("<i", 2) + b"J") == 1
    parts["a/data.pkl"] = parts["a/data.pkl"].replace(struct.pack("<i", 2) + b"J", b"\x09\0\0\0J")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="reaches beyond its 80 stored values"):
        opened(tmp_path)


def with_metadata(path, metadata):
    """Rewrites the first tensor of a file as torch writes one with a negative bit."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    hooks = b"ccollections\nOrderedDict\n)R"
    parts["a/data.pkl"] = parts["a/data.pkl"].replace(hooks, hooks + metadata, 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_a_tensor_that_is_stored_negated_is_refused(tmp_path):
    path, x = tmp_path / "x.pt", acts(6)
    for content, name in (({"n": 1, "h": x}, "tensor 'h'"), (x, "a tensor")):
        torch_save(path, content)
        with_metadata(path, b"}X\x03\0\0\0neg\x88s")
        message = rf"x\.pt: {name} is stored with \{{'neg': True\}}.*save tensor\.resolve_neg"
        with pytest.raises(ValueError, match=message) as caught:
            opened(path)
        assert "pickled objects" not in str(caught.value)
        torch_save(path, content)
        with_metadata(path, b"}")
        check(path, x)


def test_a_tensor_that_torch_stores_negated_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    negated = torch.randn(6, T, D, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    torch.save({"h": negated}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: tensor 'h' is stored with"):
        opened(tmp_path)
    torch.save({"h": negated.resolve_neg().contiguous()}, tmp_path / "x.pt")
    check(tmp_path, negated.numpy(force=True))


def activault(folder, x, tokens, told=None):
    hook = folder / "models.layers.3.mlp"
    hook.mkdir(parents=True)
    for i in range(2):
        half = slice(i * 4, i * 4 + 4)
        size = x[half].nbytes + tokens[half].nbytes
        content = {"states": x[half], "input_ids": tokens[half], "tensor_bytes": size}
        torch_save(hook / f"0c7d--{i + 1}_0.saved.pt", content)
    about = {"batch_size": 2, "sequence_length": T, "dtype": f"torch.{x.dtype.name}", "d_in": D}
    (hook / "metadata.json").write_text(json.dumps(about | (told or {})))
    (hook / "statistics.json").write_text("{}")
    (folder / "cfg.json").write_text("{}")
    return hook


def test_activault(tmp_path):
    x, tokens = acts(8, BF16), ids(8)
    hook = activault(tmp_path / "run", x, tokens)
    foreign, _ = check(hook, x, tokens, kind="activault")
    assert foreign.known == {"site": "models.layers.3.mlp"}
    with pytest.raises(ValueError, match=r"run holds no activations: its folders models\.layers"):
        opened(tmp_path / "run")
    other = activault(tmp_path / "other", x, tokens, {"d_in": 9})
    with pytest.raises(ValueError, match=r"= \(5, 8, 'torch.bfloat16'\), but metadata.json says"):
        opened(other)


def llamascopium(folder, x, tokens, mask, attention):
    folder.mkdir(parents=True)
    for i in range(3):
        part = slice(i * 4, i * 4 + 4)
        columns = {"activation": x[part], "tokens": tokens[part]}
        if mask is not None:
            columns |= {"mask": mask[part].astype(np.int32), "attention_mask": attention[part]}
        safetensors.numpy.save_file(columns, folder / f"shard-{i // 2}-chunk-{i:08d}.safetensors")
        (folder / f"shard-{i // 2}-chunk-{i:08d}.meta.json").write_text("[]")


def test_llamascopium_honours_both_masks(tmp_path):
    x, tokens = acts(12), ids(12)
    mask, attention = np.ones((12, T), bool), np.ones((12, T), np.int32)
    mask[:, 0], mask[3, 2], attention[5, 3:] = False, False, 0
    x[5, 4] = np.nan  # nobody looks at what is masked
    llamascopium(tmp_path / "blocks.5.hook_resid_post", x, tokens, mask, attention)
    foreign, found = opened_masks(tmp_path / "blocks.5.hook_resid_post")
    assert foreign.known == {"site": "blocks.5.hook_resid_post"}
    np.testing.assert_array_equal(bits(found.acts), bits(x))
    assert (found.masked[:, 0] == 1).all() and found.masked[3].tolist() == [1, 0, 2, 0, 0]
    assert found.masked[5].tolist() == [1, 0, 0, 3, 3] and found.masked[6].tolist() == [
        1,
        0,
        0,
        0,
        0,
    ]
    llamascopium(
        tmp_path / "old", np.nan_to_num(x)[:, :4], tokens[:, :4], None, None
    )  # before there were masks
    _, found = opened_masks(tmp_path / "old")
    assert not found.masked.any()


def opened_masks(path):
    format, foreign = opened(path)
    assert format == "llamascopium"
    return foreign, everything(foreign)


def test_masks_that_do_not_say_why():
    kept = np.array([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
    assert codes_of_kept(kept).tolist() == [[1, 0, 0, 3], [0, 2, 0, 0], [3, 3, 3, 3]]


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_dictionary_learning(tmp_path, dtype):
    lengths = [4, 2, 5, 1, 3]
    x, tokens = acts(sum(lengths), dtype, shape=(D,)), ids(1, length=sum(lengths))[0]
    folder = tmp_path / "layer_3_out"
    folder.mkdir()
    for i, part in enumerate((x[:7], x[7:])):  # a context goes across
        part.tofile(folder / f"shard_{i}.memmap")
        about = {"shape": list(part.shape), "dtype": f"torch.{part.dtype.name}"}
        (folder / f"shard_{i}.meta").write_text(json.dumps(about))
    config = {"shard_count": 2, "store_tokens": True, "store_sequence_ranges": True}
    (folder / "config.json").write_text(json.dumps(config))
    torch_save(tmp_path / "tokens.pt", tokens)
    torch_save(tmp_path / "sequence_ranges.pt", np.cumsum([0, *lengths]))
    format, foreign = opened(folder)
    found = everything(foreign)
    assert format == "dictionary_learning" and foreign.parts[0].shape == (5, 5, D)
    assert ((found.masked == 0).sum(1) == lengths).all() and (found.masked[1, 2:] == 3).all()
    np.testing.assert_array_equal(bits(found.acts[found.masked == 0]), bits(x))
    np.testing.assert_array_equal(found.tokens[found.masked == 0], tokens)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json has no 'shard_count': not a whole cache"):
        opened(folder)
    (folder / "config.json").write_text(json.dumps({"shard_count": 2}))
    check(folder, x[:, None], kind="dictionary_learning")
    (folder / "shard_1.memmap").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"shard_1\.memmap has 4 bytes, not the"):
        opened(folder)
    (folder / "shard_1.meta").write_text("{}")
    with pytest.raises(ValueError, match=r"shard_1\.meta has no 'shape': not a whole cache"):
        opened(folder)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_parquet(tmp_path, fixed, dtype):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x, tokens = acts(40, dtype), ids(40)
    number = pa.from_numpy_dtype(dtype)
    row = pa.list_(number, D) if fixed else pa.list_(number)
    kinds = {"h": pa.list_(row, T) if fixed else pa.list_(row), "input_ids": pa.list_(pa.int64())}
    columns = {"h": x.tolist(), "input_ids": tokens.tolist(), "text": ["?"] * 40}
    schema = pa.schema([*kinds.items(), ("text", pa.string())])
    pq.write_table(pa.table(columns, schema), tmp_path / "x.parquet", row_group_size=7)
    check(tmp_path, x, tokens, kind="parquet")
    rows = pa.table({"v": x[:, 0].tolist()}, pa.schema([("v", row)]))
    (tmp_path / "rows").mkdir()
    pq.write_table(rows, tmp_path / "rows" / "x.parquet", row_group_size=7)
    check(tmp_path / "rows", x[:, :1], kind="parquet")
    ragged = pa.table({"v": [[1.0] * D] * 5 + [[1.0] * (D - 1)]})
    pq.write_table(ragged, tmp_path / "rows" / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: 'v' holds lists of different lengths"):
        everything(opened(tmp_path / "rows")[1])
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"x\.parquet is not a sound parquet file"):
        opened(tmp_path / "x.parquet")


def test_parquet_heeds_no_other_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x, path = acts(9), tmp_path / "x.parquet"
    others = {
        "score": pa.array([None] + [1.0] * 8),
        "spans": [[[1, 2], [3]]] * 9,
        "point": [{"a": 1.0}] * 9,
        "when": pa.array([1] * 9, pa.duration("s")),
    }
    for name, column in others.items():
        pq.write_table(pa.table({"h": x.tolist(), name: column}), path)
        check(path, x.astype(np.float64))
        check(path, x.astype(np.float64), field="h")
    zeros = pa.array([0] * 9, pa.int8()), pa.array(range(9), pa.int32())
    others["union"] = pa.UnionArray.from_dense(*zeros, [pa.array([1.0] * 9)])  # in Arrow alone
    found = {name: pa.array(column)[:1] for name, column in {"h": x.tolist(), **others}.items()}
    assert lists.names_of(found, Wanted(), path) == ("h", None)
    for name, message in [
        ("score", "'score' holds 1 empty cells"),
        ("spans", "'spans' holds lists of different lengths"),
        ("point", r"'point' is of type struct<a: double>: activations must be float16"),
        ("union", r"'union' is of type dense_union<0: double=0>: activations must be"),
        ("x", r"has no 'x' \(--field\); it has h list.* point struct<a: double>\[1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            lists.names_of(found, Wanted(field=name), path)
    pq.write_table(pa.table({name: others[name] for name in ("point", "spans")}), path)
    with pytest.raises(ValueError, match=r"holds point struct<a: double>\[1\], spans .*; none .*"
                       r"give float16, .*; .*'spans' holds lists of different"):  # fmt: skip
        opened(path)
    pq.write_table(pa.table({"h": x.tolist(), "point": others["point"]}), path)
    with pytest.raises(ValueError, match="'point', first row, is of type object: token ids must"):
        opened(path, tokens="point")


def test_parquet_with_two_columns_of_one_name(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = [acts(3).tolist()] * 2
    pq.write_table(
        pa.Table.from_arrays(list(map(pa.array, columns)), ["h", "h"]), tmp_path / "x.parquet"
    )
    with pytest.raises(ValueError, match=r"x\.parquet has more than one column 'h'; rename"):
        opened(tmp_path)


def test_saelens_by_hand(tmp_path):
    pa = pytest.importorskip("pyarrow")
    x, tokens, hook = acts(20), ids(20), "blocks.1.hook_mlp_out"
    schema = pa.schema(
        {hook: pa.list_(pa.list_(pa.float32())), "token_ids": pa.list_(pa.int32(), T)}
    )
    listed = []
    for i, part in enumerate((slice(0, 13), slice(13, 20))):
        name = f"data-{i:05d}-of-00002.arrow"
        table = pa.table({hook: x[part].tolist(), "token_ids": tokens[part].tolist()}, schema)
        with pa.ipc.new_stream(tmp_path / name, schema) as stream:
            stream.write_table(table, max_chunksize=4)
        listed.append({"filename": name})
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    (tmp_path / "dataset_info.json").write_text("{}")
    foreign, _ = check(tmp_path, x, tokens, kind="saelens")
    assert foreign.known == {"site": hook}
    last = tmp_path / listed[1]["filename"]
    last.write_bytes(last.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"data-00001-of-00002\.arrow is truncated"):
        everything(opened(tmp_path)[1])
    last.unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.arrow is missing, and state\.json"):
        opened(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_saelens_by_its_own_runner(tmp_path):
    runner_of = pytest.importorskip("sae_lens.cache_activations_runner")
    import torch

    runner = runner_of.CacheActivationsRunner.__new__(runner_of.CacheActivationsRunner)
    hook = "blocks.0.hook_resid_post"
    runner.context_size = T
    runner.cfg = types.SimpleNamespace(hook_name=hook, d_in=D, n_seq_in_buffer=6)
    runner.features = runner_of.Features(
        {
            hook: runner_of.Array2D(shape=(T, D), dtype="float32"),
            "token_ids": runner_of.Sequence(runner_of.Value(dtype="int32"), length=T),
        }
    )
    x, tokens = acts(18), ids(18)
    (tmp_path / "out" / ".tmp_shards").mkdir(parents=True)
    for i in range(3):
        part = slice(i * 6, i * 6 + 6)
        flat = torch.tensor(x[part]).reshape(-1, D), torch.tensor(tokens[part]).reshape(-1)
        runner._create_shard(flat).save_to_disk(
            tmp_path / "out" / ".tmp_shards" / f"shard_{i:05d}", num_shards=1
        )
    runner._consolidate_shards(tmp_path / "out" / ".tmp_shards", tmp_path / "out", copy_files=False)
    check(tmp_path / "out", x, tokens, kind="saelens")
    alone = "import sys, numpy as np; from saejax.data.foreign.formats import *; " + (
        "f = open_foreign(sys.argv[1], Wanted())[1]; print('datasets' in sys.modules, "
        "sum(float(b.acts.sum()) for p in f.parts for b in p.read(np.arange(p.shape[0]))))"
    )
    command = [sys.executable, "-c", alone, str(tmp_path / "out")]  # where nobody knows Array2D
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    known, total = done.stdout.split()
    assert known == "False" and float(total) == pytest.approx(x.sum(), rel=1e-4)
    runner_of.Dataset.load_from_disk(tmp_path / "out").to_parquet(tmp_path / "hub.parquet")
    check(tmp_path / "hub.parquet", x, tokens, kind="parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", np.zeros((3, D), np.int32), "is of type int32: activations must be"),
        ("x.npy", np.zeros(3, np.float32), r"shape \(3,\): give rows \[N, D\] or contexts"),
        ("x.npy", np.zeros((0, D), np.float32), r"x\.npy.* is empty: its shape is \(0, 8\)"),
        ("x.npy", b"", r"x\.npy is no sound \.npy array"),
        ("x.npy", np.array([{}], object), r"x\.npy is no sound \.npy array: .*objects"),
        ("x.safetensors", b"", r"x\.safetensors is empty"),
        ("x.safetensors", b"\x00\x01\x00\x00\x00\x00\x00\x00{", "header is cut off"),
        ("x.safetensors", b"\x02\0\0\0\0\0\0\0[]", "not a sound safetensors file"),
        ("x.pt", b"PK", r"x\.pt is truncated, or no file of torch\.save in its zip format"),
        ("x.txt", b"PK", "holds no activations: known are"),
    ],
)
def test_unsound_files(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        opened(tmp_path / "none")


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".npy", r"x\.npy is no sound \.npy array"),
        (".safetensors", "truncated: a tensor ends at byte 1440 of 1433"),
        (".pt", r"x\.pt is truncated"),
    ],
)
def test_truncated_files(tmp_path, suffix, message):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, acts(9))
    elif suffix == ".pt":
        torch_save(path, acts(9))
    else:
        safetensors.numpy.save_file({"h": acts(9)}, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_one_kind_of_files_or_say_which(tmp_path):
    np.save(tmp_path / "x.npy", acts(2))
    torch_save(tmp_path / "x.pt", acts(2))
    with pytest.raises(ValueError, match="files of npy, torch: say which with --format"):
        detect(tmp_path)
    check(tmp_path, acts(2), format="torch")
    with pytest.raises(ValueError, match="is not of format 'parquet'"):
        opened(tmp_path, format="parquet")
    with pytest.raises(ValueError, match="format 'csv': allowed are saejax, saelens"):
        opened(tmp_path, format="csv")


def test_the_state_of_a_source_changes_with_its_content(tmp_path):
    def state():
        return state_of(opened(tmp_path)[1])

    np.save(tmp_path / "a.npy", acts(2))
    first = state()
    np.save(tmp_path / "a.npy", acts(2))
    assert state() == first
    np.save(tmp_path / "a.npy", acts(2, seed=1))
    assert state() != first
    np.save(tmp_path / "a.npy", acts(2))
    np.save(tmp_path / "b.npy", acts(2))
    assert state() != first


def test_rows_are_looked_at_before_any_is_stored(tmp_path):
    x = np.ones((50, D), np.float32)
    x[7], x[30] = 100, -60
    np.save(tmp_path / "x.npy", x)
    reader = Reader(opened(tmp_path)[1].parts)
    kept, left_out = reader.sound_rows(10.0)
    assert left_out == {"norm": 2} and set(range(50)) - set(kept.tolist()) == {7, 30}
    assert len(reader.sound_rows(0)[0]) == 50
    x[41, 3] = np.inf
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"x\.npy: 1 activations hold NaN .*the first at row 41"):
        Reader(opened(tmp_path)[1].parts).sound_rows(10.0)


def test_tokens_decide_what_is_masked(tmp_path):
    tokens = np.array([[0, 5, 6, 2, 2], [5, 0, 6, 7, 2]])
    safetensors.numpy.save_file({"h": acts(2), "tokens": tokens}, tmp_path / "x.safetensors")
    foreign = opened(tmp_path)[1]
    found = Reader(foreign.parts, {0: 1, 2: 3}).gather(np.array([1, 0]), 0)
    assert found.masked.tolist() == [[0, 1, 0, 0, 3], [1, 0, 0, 3, 3]]
    with pytest.raises(ValueError, match=r"token id 7 is outside of 0 \.\. 6"):
        Reader(foreign.parts, {}, 7).gather(np.array([1]), 0)
