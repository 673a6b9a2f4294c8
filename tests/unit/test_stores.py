"""The store command: what is imported is stored as it was, exported it comes back bit by bit."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from saejax import stores
from saejax.data.exporting import export
from saejax.data.layout import StoreSpec
from saejax.data.loader import LoaderConfig
from saejax.data.shards import Store, open_store
from saejax.importing import ImportConfig, import_activations
from saejax.latents.summaries import top_examples
from saejax.mesh import MeshShape, make_mesh
from saejax.model.normalizer import Normalizer
from saejax.model.sae import SAE, SAEConfig
from saejax.sources import StoredConfig, contexts_of, open_source
from saejax.subjects.hf import load_subject

ROOT = pathlib.Path(__file__).resolve().parents[2]
D, T = 8, 6
BOS = 1


def bits(array):
    return np.asarray(array).astype(ml_dtypes.bfloat16).view(np.uint16)


def files(path):
    return sorted(str(p.relative_to(path)) for p in pathlib.Path(path).rglob("*") if p.is_file())


def matrix(n, seed=0, shape=(D,)):
    return np.random.default_rng(seed).normal(0.2, 2, (n, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """A folder with 90 contexts and their tokens; the first of each is BOS, of a huge norm."""
    folder = tmp_path_factory.mktemp("contexts")
    x, tokens = matrix(90, shape=(T, D)), np.random.default_rng(1).integers(5, 90, (90, T))
    tokens[:, 0], x[:, 0], x[4, 3] = BOS, 900, 5000
    for i, part in enumerate((slice(0, 50), slice(50, 90))):
        columns = {"h": x[part], "tokens": tokens[part]}
        safetensors.numpy.save_file(columns, folder / f"{i}.safetensors")
    return folder, x, tokens


def imported(source, root, **named):
    return import_activations(ImportConfig(source=str(source), width=D, **named), root)


def opened(path, sae, batch_size, subject=None):
    config = StoredConfig(path=str(path), subject=subject)
    mesh = make_mesh(MeshShape(1, 1), jax.devices()[:1])
    return open_source(config, sae, LoaderConfig(), batch_size, pathlib.Path("unused"), mesh)


def rows_of(store):
    """{(context, position): (row's bits, token, document, offset)} of everything in a store."""
    found, first = {}, store.spec.first_position
    for shard in store.committed():
        got = store.read_shard_rows(shard)
        for c, r in zip(*np.nonzero(got.stored)):
            about = int(got.tokens[c, first + r]), int(got.document[c]), int(got.offset[c])
            found[int(got.context[c]), int(first + r)] = (bits(got.rows[c, r]).tobytes(), *about)
    return found


def test_contexts_go_into_two_splits_with_their_provenance(contexts, tmp_path):
    folder, x, tokens = contexts
    made = imported(folder, tmp_path, bos=BOS, held_out_percent=20.0)
    assert list(made) == ["train", "held_out"]
    by_split = {split: rows_of(store) for split, store in made.items()}
    ids = {split: {context for context, _ in rows} for split, rows in by_split.items()}
    assert not ids["train"] & ids["held_out"] and len(ids["held_out"]) in (16, 17, 18)
    for store, rows in zip(made.values(), by_split.values()):
        store.verify()
        spec, left_out = store.spec, store.manifest["left_out"]
        assert (spec.subject, spec.site, spec.context_length, spec.first_position) == (
            "unknown", "unknown", T, 0,
        )  # fmt: skip
        assert left_out["bos"] == spec.n_shards * spec.contexts_per_shard
        assert left_out["first_positions"] == left_out["special"] == 0
        assert store.documents == ("0.safetensors", "1.safetensors")
        for (context, position), (row, token, document, offset) in rows.items():
            assert position > 0 and row == bits(x[context, position]).tobytes()
            assert token == tokens[context, position] and document == (context >= 50)
            assert offset == (context - 50 * document) * T
    norms = sum(store.manifest["left_out"]["norm"] for store in made.values())
    every = by_split["train"] | by_split["held_out"]
    assert norms == (4 in ids["train"] | ids["held_out"]) and (4, 3) not in every
    assert made["train"].manifest["provenance"]["imported"] == "safetensors"
    permuted = made["train"].read_contexts(0)[:, 0]
    assert (np.diff(permuted.astype(int)) < 0).any()


def test_an_import_that_was_killed_is_continued(contexts, tmp_path, monkeypatch):
    folder = contexts[0]
    named = {"bos": BOS, "contexts_per_shard": 8}
    clean = imported(folder, tmp_path / "clean", **named)["train"]
    assert clean.spec.n_shards == 10
    write, count = Store.write_shard, iter(range(100))

    def until_killed(self, *arguments, **columns):
        if next(count) >= 3:
            raise KeyboardInterrupt
        return write(self, *arguments, **columns)

    monkeypatch.setattr(Store, "write_shard", until_killed)
    with pytest.raises(KeyboardInterrupt):
        imported(folder, tmp_path / "b", **named, memory=1)
    monkeypatch.undo()
    half = open_store(tmp_path / "b" / "train")
    assert 0 < len(half.committed()) < 10 and "unfinished" in stores.describe(half)
    before = {shard: half.record(shard)["sha256"] for shard in half.committed()}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # two more at once
        again = [pool.submit(imported, folder, tmp_path / "b", **named, memory=1) for _ in "ab"]
        done, _ = (future.result()["train"] for future in again)
    assert {shard: done.record(shard)["sha256"] for shard in before} == before
    assert done.manifest["sha256"] == clean.manifest["sha256"]  # whatever the passes
    other = imported(folder, tmp_path / "c", **named, seed=1)["train"]
    assert other.manifest["sha256"] != clean.manifest["sha256"]
    with pytest.raises(ValueError, match=r"another spec \(text_fingerprint"):
        imported(folder, tmp_path / "b", **(named | {"bos": None}))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A .npy of 700 rows with three of a huge norm, and the stores that are made of it."""
    folder = tmp_path_factory.mktemp("rows")
    x = matrix(700)
    x[[5, 100, 650]] *= 1000
    np.save(folder / "x.npy", x)
    return folder, x, imported(folder / "x.npy", folder / "stores")


def test_a_disk_without_room_is_found_before_anything_is_made(contexts, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"has 0\.00 GB free"):
        imported(contexts[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_without_contexts_lose_only_what_is_outlying(rows):
    _, x, made = rows
    train = made["train"]
    found = rows_of(train) | rows_of(made["held_out"])
    assert train.manifest["provenance"]["left_out_before"] == {"norm": 3}
    assert not {(5, 0), (100, 0), (650, 0)} & set(found)
    assert all(row == bits(x[i]).tobytes() and o == i for (i, _), (row, _, _, o) in found.items())
    assert len(found) >= 0.95 * 697 and sum(train.manifest["left_out"].values()) == 0
    assert train.spec.rows_per_context == 1 and set(train.chunks) == {1}


def test_rows_without_contexts_serve_every_stage(rows):
    folder, _, made = rows
    sae = SAEConfig(d_model=D, n_latents=16, k=2)
    train = made["train"]
    batch = train.spec.contexts_per_shard * 2
    source = opened(f"{folder}/stores", sae, batch)
    epoch = train.n_rows // batch
    seen = [source.batches.provenance(step)[:, :2] for step in range(epoch)]
    assert len({tuple(row) for row in np.concatenate(seen)}) == epoch * batch  # each once
    batch_0 = source.batches.batch(0)
    assert batch_0.shape == (batch, D) and source.batches.sample_rows(64).shape == (64, D)
    held_out = np.concatenate(list(source.held_out()))
    assert held_out.shape == (made["held_out"].n_rows, 1, D)
    assert source.inputs is None and source.documents == ("x.npy",)
    w_dec = matrix(16)
    params = {"w_enc": w_dec, "w_dec": w_dec, "latent_bias": w_dec[:, 0] * 0, "pre_bias": w_dec[0]}
    model = SAE(sae, params, Normalizer())
    examples = top_examples(model, contexts_of(made["held_out"]), np.arange(4), 3)
    assert examples.contexts == made["held_out"].n_rows and (examples.ids >= -1).all()


def test_a_run_trains_on_imported_rows(rows, tmp_path):
    """gin/stored.gin, with nothing but what fits it to this store."""
    settings = f"""
        Stored.path = '{rows[0]}/stores'
        Stored.subject = None
        SAE.d_model = {D}
        SAE.n_latents = 32
        SAE.k = 4
        Train.tokens = 6400
        Experiment.report = None
        Train.batch_size = 64
        Train.sample_rows = 256
        Optimizer.warmup_steps = 5
        Loss.dead_tokens = 2000
        Evaluation.pca = False
        Mesh.mesh_shape = (1, 1)
    """
    (tmp_path / "mine.gin").write_text("\n".join(map(str.strip, settings.splitlines())))
    flags = ["--gin_file=gin/stored.gin", "--gin_file=mine.gin", "--workdir=run"]
    done = subprocess.run(
        [sys.executable, "-m", "saejax.main", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["tokens"] == rows[2]["held_out"].n_rows and "delta_ce" not in found
    assert found["nmse"] < 0.8 * found["baselines"]["untrained_nmse"]


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    """A store as a harvest makes it: masks, a first position, documents, an empty shard."""
    folder = tmp_path_factory.mktemp("harvested")
    spec = StoreSpec(
        subject="tiny", subject_fingerprint="aa", text_fingerprint="bb", split="train",
        site="1.resid_post", d_model=D, context_length=T, first_position=1, contexts_per_shard=4,
        n_shards=5, max_norm_ratio=10.0,
    )  # fmt: skip
    store = open_store(folder / "train", spec, "w")
    rng = np.random.default_rng(5)
    ids = rng.permutation(40)[:20]
    for shard in range(5):
        part = ids[shard * 4 : shard * 4 + 4]
        masked = np.where(rng.random((4, T)) < 0.2, 2, 0).astype(np.uint8)
        if shard == 3:
            masked[:] = 2  # nothing to store
        where = {"context": part, "document": part % 3, "offset": part * 7}
        tokens = rng.integers(0, 50_000, (4, T))
        acts = matrix(4, shard, (T - 1, D))
        store.write_shard(shard, acts, tokens=tokens, masked=masked, **where)
    store.write_documents(["a.py", "b.py", "c.py"])
    store.finish({"note": "test", "lead": 1})
    return open_store(folder / "train")


@pytest.mark.parametrize("max_bytes", [2**30, 500])
def test_an_export_in_text_order_comes_back_bit_by_bit(harvested, tmp_path, max_bytes):
    index = export(harvested, tmp_path / "out", order="text", max_bytes=max_bytes)
    assert len(index["files"]) > 1 or max_bytes > 500
    stored = rows_of(harvested)
    loaded = [
        safetensors.numpy.load_file(tmp_path / "out" / file["name"]) for file in index["files"]
    ]
    columns = {key: np.concatenate([one[key] for one in loaded]) for key in loaded[0]}
    keys = list(zip(columns["context"].tolist(), columns["position"].tolist()))
    assert keys == sorted(stored) and columns["activations"].dtype == ml_dtypes.bfloat16
    for i, (context, position) in enumerate(keys):
        row, token, document, offset = stored[context, position]
        assert bits(columns["activations"][i]).tobytes() == row
        assert columns["tokens"][i] == token and columns["document"][i] == document
        assert columns["offset"][i] == offset + position
    back = imported(tmp_path / "out", tmp_path / "back", split="train", contexts_per_shard=1)
    back = back["train"]
    assert back.lead == harvested.lead == 1 and min(columns["offset"]) >= 0
    assert rows_of(back) == stored and back.documents == harvested.documents
    for name in ("subject", "subject_fingerprint", "site", "first_position", "compute_dtype"):
        assert getattr(back.spec, name) == getattr(harvested.spec, name)
    tables = [
        np.concatenate([store.read_contexts(shard) for shard in store.committed()])
        for store in (harvested, back)
    ]
    first, second = (table[np.argsort(table[:, 0])] for table in tables)
    np.testing.assert_array_equal(first, second)  # tokens of masked positions too


def test_an_export_in_stored_order_is_what_the_store_gives(harvested, tmp_path):
    index = export(harvested, tmp_path / "out", order="stored", max_bytes=700)
    loaded = [
        safetensors.numpy.load_file(tmp_path / "out" / file["name"]) for file in index["files"]
    ]
    expected = np.concatenate([chunk for chunk, _, _ in harvested.rows()])
    got = np.concatenate([one["activations"] for one in loaded])
    np.testing.assert_array_equal(bits(got), bits(expected))
    assert all(file["bytes"] < 700 + 1000 for file in index["files"])
    back = imported(tmp_path / "out", tmp_path / "back", split="train", contexts_per_shard=1)
    found, stored = rows_of(back["train"]), rows_of(harvested)
    assert sorted(row for row, *_ in found.values()) == sorted(row for row, *_ in stored.values())
    with safetensors.safe_open(tmp_path / "out" / index["files"][0]["name"], "numpy") as file:
        about = file.metadata()
    assert about["site"] == "1.resid_post" and about["subject"] == "tiny"
    assert float(about["mean_norm"]) == harvested.manifest["mean_norm"] == index["mean_norm"]
    assert index["mean"] == harvested.manifest["mean"]


def test_an_export_is_whole_or_not_there(harvested, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(np, "divmod", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(harvested, out)
    assert files(out) and all(name.endswith(".partial") for name in files(out))
    monkeypatch.undo()
    export(harvested, out)
    assert not any(name.endswith(".partial") for name in files(out))
    with pytest.raises(
        ValueError, match=r"out is not empty \(index\.json\); choose another folder"
    ):
        export(harvested, out)
    (out / "activations-00001-of-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"activations-00001.* is missing, and index\.json"):
        imported(out, tmp_path / "back")


def test_the_subject_of_imported_contexts(tmp_path, monkeypatch):
    subject, site = load_subject("embedded"), "1.resid_post"
    monkeypatch.setattr("saejax.importing.load_subject", lambda name, **_: subject)
    tokens = np.random.default_rng(0).integers(1, subject.tokenizer.vocab_size, (24, 8))
    tokens[3, 4] = next(iter(subject.tokenizer.special_ids))
    acts = np.asarray(subject.capture(subject.params, tokens, (site,), np.float32)[site])
    columns = {"h": acts, "tokens": tokens}
    safetensors.numpy.save_file(columns, tmp_path / "x.safetensors")
    source, width = str(tmp_path / "x.safetensors"), acts.shape[2]
    named = {"source": source, "width": width, "subject": "embedded", "site": site}
    made = import_activations(ImportConfig(**named, held_out_percent=50.0), tmp_path / "s")
    masked = [store.manifest["left_out"] for store in made.values()]
    assert sum(one["special"] + one["bos"] for one in masked) == 1
    sae = SAEConfig(d_model=width, n_latents=16, k=2)
    monkeypatch.setattr("saejax.sources.load_subject", lambda name, **_: subject)
    inputs = opened(tmp_path / "s", sae, 4, "embedded").inputs()
    assert inputs.site == site and inputs.first_position == 0
    with pytest.raises(ValueError, match=r"site = '9\.none' does not exist in subject 'embedded'"):
        import_activations(ImportConfig(**(named | {"site": "9.none"})), tmp_path / "t")
    tokens[0, 0] = subject.tokenizer.vocab_size
    safetensors.numpy.save_file(columns, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="tokens of another model"):
        import_activations(ImportConfig(**named), tmp_path / "u")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_subject_of_an_import_is_loaded_as_it_was_recorded(tmp_path, monkeypatch, dtype):
    """Of PyTorch its fingerprint follows the type of the weights, which is not the array's."""
    real, site = load_subject("embedded"), "1.resid_post"

    def load(name, *, dtype="float32", **_):
        assert name == "torch:embedded" and dtype in ("float32", "bfloat16")
        return dataclasses.replace(real, fingerprint=f"of {dtype}")

    for module in ("importing", "sources"):
        monkeypatch.setattr(f"saejax.{module}.load_subject", load)
    tokens = np.random.default_rng(0).integers(1, 90, (24, 8))
    columns = {"h": matrix(24, shape=(8, real.d_model)).astype(dtype), "tokens": tokens}
    safetensors.numpy.save_file(columns, tmp_path / "x.safetensors")
    named = {"width": real.d_model, "subject": "torch:embedded", "site": site}
    cfg = ImportConfig(source=str(tmp_path / "x.safetensors"), held_out_percent=50.0, **named)
    made = import_activations(cfg, tmp_path / "s")
    assert made["train"].spec.compute_dtype == "float32"
    assert made["train"].manifest["provenance"]["dtype"] == np.dtype(dtype).name
    sae = SAEConfig(d_model=real.d_model, n_latents=16, k=2)
    assert opened(tmp_path / "s", sae, 4, "torch:embedded").subject().fingerprint == "of float32"


def test_special_tokens_of_the_subject_are_not_stored(contexts, tmp_path, monkeypatch):
    tokenizer = types.SimpleNamespace(vocab_size=90, special_ids={BOS, 7, 8}, bos_id=BOS)
    subject = types.SimpleNamespace(
        name="tiny", fingerprint="ab", tokenizer=tokenizer, vocab_size=90, width=lambda site: D
    )
    monkeypatch.setattr("saejax.importing.load_subject", lambda name, **_: subject)
    store = imported(contexts[0], tmp_path, subject="x", split="train", contexts_per_shard=90)
    store, tokens = store["train"], contexts[2]
    left_out = store.manifest["left_out"]
    assert (
        left_out["bos"] == 90 and left_out["special"] == ((tokens == 7) | (tokens == 8)).sum() > 0
    )
    assert (store.spec.subject, store.spec.subject_fingerprint) == ("tiny", "ab")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"width": 9}, r"0\.safetensors: 'h' is 8 wide, and --width is 9"),
        ({"dtype": "float16"}, r"0\.safetensors is float32, and --dtype is float16"),
        ({"contexts_per_shard": 87}, "train split has 86 contexts, fewer than a shard"),
        ({"max_bytes": 100}, r"max_bytes = 100: the store needs \d+"),
        ({"dtype": "int8"}, r"dtype = 'int8': allowed are float16"),
        ({"split": "test"}, "'both', 'train' or 'held_out'"),
        ({"held_out_percent": 0}, "above 0 and below 100; --split=train holds nothing out"),
        ({"max_norm_ratio": 0.5}, "must be above 1, or 0 for none"),
        ({"first_position": 6}, "first_position = 6"),
        ({"seed": -1}, r"import seed = -1: must be in \[0, 2\*\*63\)"),
        ({"seed": 2**63}, r"import seed = 9223372036854775808: must be in"),
        ({"field": "x"}, r"has no 'x' \(--field\)"),
    ],
)
def test_what_is_not_as_asked_for_is_refused(contexts, tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        import_activations(
            ImportConfig(**({"source": str(contexts[0]), "width": D} | named)), tmp_path / "s"
        )
    assert not (tmp_path / "s").exists()


def test_files_that_disagree_or_are_not_sound(tmp_path):
    np.save(tmp_path / "0.npy", matrix(10, shape=(T, D)))
    for other, message in [
        (matrix(4, shape=(T, D + 1)), r"1\.npy is 9 wide"),
        (
            matrix(4, shape=(T + 1, D)),
            r"disagree: tokens a context of .*1\.npy is 7, of .*0\.npy 6",
        ),
        (matrix(4, shape=(T, D)).astype(np.float16), "disagree: type of .*1.npy is float16"),
    ]:
        np.save(tmp_path / "1.npy", other)
        with pytest.raises(ValueError, match=message):
            imported(tmp_path, tmp_path / "s")
    bad = matrix(10, shape=(T, D))
    bad[7, 2, 3] = np.nan
    np.save(tmp_path / "1.npy", bad)
    with pytest.raises(
        ValueError, match=r"1\.npy: 1 activations hold NaN .* context 7, position 2"
    ):
        imported(tmp_path, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    np.save(tmp_path / "1.npy", bad[:1])
    (tmp_path / "0.npy").unlink()
    with pytest.raises(ValueError, match="has one context, too few for two splits"):
        imported(tmp_path, tmp_path / "t")
    with pytest.raises(ValueError, match="has no token ids, so none can be left out"):
        imported(tmp_path, tmp_path / "t", bos=3)


def test_what_a_refused_import_leaves(tmp_path):
    source, root = tmp_path / "x.npy", tmp_path / "s"
    named = {"contexts_per_shard": 10, "memory": 1}  # a shard a pass
    x = matrix(40, shape=(T, D))
    x[:, 2] = np.nan
    np.save(source, x)
    with pytest.raises(ValueError, match=r"hold NaN.*make them again$"):
        imported(source, root, **named)
    assert not root.exists()
    root.mkdir()
    (root / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="hold NaN"):
        imported(source, root, **named)
    assert files(root) == ["mine.txt"]
    held_out = np.unique(
        imported(source, root, **named, first_position=3)["held_out"].read_contexts(0)[:, 0]
    )
    shutil.rmtree(root)
    x = matrix(40, shape=(T, D))
    x[held_out[0], 2] = np.nan
    np.save(source, x)
    message = rf"hold NaN.*; before .* imported, delete what was begun: {root}/train$"
    with pytest.raises(ValueError, match=message):
        imported(source, root, **named)
    assert len(open_store(root / "train").manifest["chunks"]) == 3
    assert not (root / "held_out").exists()
    np.save(source, matrix(40, shape=(T, D)))
    with pytest.raises(ValueError, match="another spec"):
        imported(source, root, **named)
    shutil.rmtree(root / "train")
    imported(source, root, **named)["held_out"].verify()


def test_places_where_no_store_can_be(contexts, tmp_path):
    (tmp_path / "file").write_text("")
    for place, message in [
        ("ftp://x/y", "import store = 'ftp://x/y': scheme 'ftp' is not supported; give a local"),
        (tmp_path / "file/below", r"import store = '.*/file/below': .*/file is not a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            imported(contexts[0], place)


def test_the_commands(contexts, tmp_path, capsys):
    def run(*arguments):
        code = stores.main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    store, out = tmp_path / "store", tmp_path / "out"
    code, _, said = run("import", contexts[0], store, "--width", D, "--bos", BOS, "--site", "3.mlp")
    assert code == 0 and "import train: " in said and "left out: 84 bos, " in said
    code, told, _ = run("info", store)
    assert code == 0 and told.index("store/held_out") < told.index("store/train")
    for line in ("site              3.mlp, 8 wide, bfloat16", "left out          84 bos, "):
        assert line in told
    assert "imported = safetensors" in told and "  4 .. 5   " in told
    code, told, _ = run("verify", store)
    assert code == 0 and told.count("sound") == 2
    code, _, said = run("export", store, out, "--order", "text", "--max_bytes", 4000)
    assert code == 0 and (out / "train/index.json").exists() and "rows in" in said
    for site in ("3.mlp", "4.mlp"):
        shutil.copytree(store / "train", tmp_path / "sites" / site / "train")
    code, *_ = run("export", f"{tmp_path}/sites/", f"{tmp_path}/by_site/", "--order", "stored")
    assert code == 0 and (tmp_path / "by_site/4.mlp/train/index.json").exists()
    code, *_ = run("export", store / "train", tmp_path / "alone")
    assert code == 0 and (tmp_path / "alone/index.json").exists()
    code, told, _ = run("verify", store / "train")
    assert code == 0 and told.count("sound") == 1
    damaged = store / "train" / "acts/c/1/0"
    data = bytearray(damaged.read_bytes())
    data[20] ^= 1
    damaged.write_bytes(data)
    code, _, said = run("verify", store)
    assert code == 1 and said.count("\n") == 1
    assert said.startswith("saejax: error: ") and "train/acts/c/1/0 (shard 1" in said
    for arguments in (("info", tmp_path / "none"), ("import", "nowhere", store, "--width", 4)):
        code, _, said = run(*arguments)
        assert code == 1 and said.startswith("saejax: error: ") and said.count("\n") == 1
    with pytest.raises(SystemExit):
        stores.main(["import", "x", "y"])
    assert "--width" in capsys.readouterr().err
