"""Harvesting the embedded subject: stored rows are its activations, however often it is killed."""

import dataclasses
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from saejax.data import records
from saejax.data.contexts import load_contexts
from saejax.data.corpus import TextConfig, read_documents
from saejax.data.layout import MASKED
from saejax.data.loader import Loader
from saejax.data.shards import open_store
from saejax.data.storage import plan_shards
from saejax.data.token_arrays import TokensConfig
from saejax.data.tokens import pack
from saejax.harvest_run import HarvestRun
from saejax.subjects import hf
from saejax.subjects.filling import make_forward, mask_codes, own_mesh
from saejax.subjects.harvest import (
    HarvestConfig,
    check_free_space,
    harvest,
    missing_at,
)
from saejax.subjects.hf import load_subject
from saejax.subjects.request import open_subject

ROOT = pathlib.Path(__file__).parents[2]
EMBEDDED = pathlib.Path(hf.__file__).parent / "embedded"
SPLITS = ("train", "held_out")


@pytest.fixture(scope="module")
def subject():
    return load_subject("embedded")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus of three dozen modules of the standard library's size and shape."""
    folder = tmp_path_factory.mktemp("text")
    source = "".join(
        f"def f_{i}(x):\n    '''Adds {i}.'''\n    return x + {i}\n\n" for i in range(60)
    )
    for i in range(36):
        (folder / f"m{i:02}.py").write_text(f"import m{i}\n\n" + source[i * 20 :])
    return folder


@pytest.fixture(scope="module")
def cfg(text):
    return HarvestConfig(
        context_length=16,
        contexts_per_shard=64,
        batch_contexts=32,
        tokens=10_000,
        text=TextConfig(source=str(text), held_out_percent=20.0),
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory, cfg, subject):
    lines = []
    path = tmp_path_factory.mktemp("clean")
    stores = harvest(cfg, path, lines.append, subject=subject)[cfg.site]
    return path, stores, lines


def test_rows_are_the_subjects_activations_at_their_provenance(clean, cfg, subject):
    for store, split in zip(clean[1], SPLITS, strict=True):
        contexts = pack(read_documents(cfg.text, split), subject.tokenizer, cfg.context_length)
        assert store.documents == contexts.names
        batches = Loader(store, store.spec.contexts_per_shard)
        rows, where = batches.batch(1), batches.provenance(1)
        table = store.read_contexts(int(where[0, 0]))
        # recomputed from the text, in float32, all positions of a context in one call
        tokens = contexts.tokens[table[:, 0]].astype(np.int32)
        np.testing.assert_array_equal(tokens, table[:, 3:])
        np.testing.assert_array_equal(contexts.document[table[:, 0]], table[:, 1])
        np.testing.assert_array_equal(contexts.offset[table[:, 0]], table[:, 2])
        capture = jax.jit(lambda params, t: subject.capture(params, t, (cfg.site,))[cfg.site])
        acts = capture(subject.params, tokens)
        expected = np.asarray(acts)[where[:, 1], where[:, 2]]
        assert (where[:, 2] > 0).all()
        error = np.abs(rows.astype(np.float32) - expected)
        assert (error <= 2.0**-8 * np.abs(expected) + 1e-4).all()  # bfloat16 rounds by 2^-9
        shifted = np.asarray(acts)[where[:, 1], where[:, 2] - 1]
        assert np.abs(rows.astype(np.float32) - shifted).mean() > 20 * error.mean()


def test_contexts_are_permuted_distinct_and_split(clean, cfg):
    train, held_out = clean[1]
    for store in (train, held_out):
        tables = [store.read_contexts(i) for i in store.committed()]
        ids = np.concatenate(tables)[:, 0].astype(int)
        assert len(np.unique(ids)) == len(ids)
        assert np.abs(np.diff(ids)).mean() > len(ids) / 10
    assert not set(train.documents) & set(held_out.documents)
    assert train.spec.split == "train" and held_out.spec.split == "held_out"
    assert abs(train.n_rows - cfg.tokens) <= 0.05 * cfg.tokens


def test_manifest_and_progress(clean, cfg, subject):
    _, (train, _), lines = clean
    manifest = train.manifest
    rows = np.concatenate([rows for rows, _, _ in train.rows()]).astype(np.float64)
    assert manifest["rows"] == len(rows) == train.n_rows
    np.testing.assert_allclose(manifest["mean"], rows.mean(0), rtol=1e-9, atol=1e-12)
    variance = ((rows - rows.mean(0)) ** 2).sum(1).mean()
    np.testing.assert_allclose(manifest["total_variance"], variance, rtol=1e-9)
    assert manifest["spec"]["subject_fingerprint"] == subject.fingerprint
    provenance = manifest["provenance"]
    assert provenance["contexts_wanted"] == -(-cfg.tokens // 15)
    assert provenance["text"]["source"] == cfg.text.source
    assert any("tokens/s" in line and "shard" in line for line in lines)
    assert "MB of activations to store" in lines[0]


def test_a_second_run_computes_nothing(clean, cfg, subject):
    path, _, _ = clean
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    lines = []
    harvest(cfg, path, lines.append, subject=subject)
    assert lines == []
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()} == before


def content(path):
    found = {p.relative_to(path): p for p in path.rglob("*") if p.is_file()}
    return {str(k): p.read_bytes() for k, p in found.items() if not p.name.endswith("__lock")}


CHILD = """
import sys
sys.path.insert(0, {root!r})
from saejax.subjects import harvest as h
from saejax.data.corpus import TextConfig
cfg = h.HarvestConfig(**{fields!r}, text=TextConfig(**{text!r}))
h.harvest(cfg, sys.argv[1], lambda line: print(line, flush=True))
"""


def test_killed_harvests_end_in_the_same_store(clean, cfg, tmp_path):
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "text"}
    code = CHILD.format(root=str(ROOT), fields=fields, text=dataclasses.asdict(cfg.text))
    rng, partial, commits = random.Random(1), [0], tmp_path / "train" / "commits"
    for trial in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        if trial < 3:  # once more has been committed than before, kill at a random moment
            while child.poll() is None and len(list(commits.glob("*.json"))) <= partial[-1]:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.05))
            child.send_signal(signal.SIGKILL)
        child.communicate()
        partial.append(len(open_store(tmp_path / "train").committed()))
    assert child.returncode == 0
    assert 0 < partial[1] < partial[-1] and partial == sorted(partial), partial
    assert content(tmp_path) == content(clean[0])


def test_two_harvests_at_once_share_the_work(clean, cfg, subject, tmp_path):
    failures = []

    def run(index):
        try:
            harvest(cfg, tmp_path, str, subject=subject, process_index=index, process_count=2)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert content(tmp_path) == content(clean[0])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed: stored 0, wanted 1"),
        ({"site": "0.mlp_out"}, "site: stored '1.resid_post', wanted '0.mlp_out'"),
        ({"dtype": "bfloat16"}, "compute_dtype: stored 'float32', wanted 'bfloat16'"),
        ({"tokens": 5000}, "n_shards"),
        ({"max_norm_ratio": None}, "max_norm_ratio: stored 10.0, wanted None"),
        ({"first_position": 0}, "first_position: stored 1, wanted 0"),
        ({"keep_special": True}, "text_fingerprint: stored"),
    ],
)
def test_another_config_in_the_same_place_is_refused(clean, cfg, subject, change, field):
    with pytest.raises(ValueError, match=field):
        harvest(dataclasses.replace(cfg, **change), clean[0], str, subject=subject)


def test_changed_text_tokenizer_or_weights_are_refused(clean, cfg, subject, text):
    module = text / "m05.py"
    original = module.read_text()
    module.write_text(original.replace("Adds", "Puts"))
    try:
        with pytest.raises(ValueError, match="text_fingerprint"):
            harvest(cfg, clean[0], str, subject=subject)
    finally:
        module.write_text(original)
    other = dataclasses.replace(subject, fingerprint="0123")
    with pytest.raises(ValueError, match="subject_fingerprint"):
        harvest(cfg, clean[0], str, subject=other)


def test_bad_input_is_refused_before_anything_is_written(cfg, subject, tmp_path):
    for change, message in (
        ({"site": "1.resid_pots"}, "1.resid_post"),
        ({"site": "9.resid_post"}, "has no layer 9"),
        ({"context_length": 4096}, "context_length = 4096"),
        ({"text": TextConfig(source=str(tmp_path / "none"))}, "none"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            harvest(dataclasses.replace(cfg, **change), tmp_path / "s", str, subject=subject)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="max_bytes = 1000"):
        harvest(dataclasses.replace(cfg, max_bytes=1000), tmp_path / "s", str, subject=subject)
    for change in (
        {"tokens": 0}, {"context_length": 1}, {"dtype": "int8"}, {"seed": -1},
        {"first_position": 16}, {"first_position": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"Harvest\.{next(iter(change))}"):
            dataclasses.replace(cfg, **change)


@pytest.mark.parametrize("field", ["tokens", "held_out_tokens"])
def test_more_than_the_quota_is_refused_before_the_text_is_opened(
    cfg, subject, tmp_path, monkeypatch, field
):
    def never(*args, **kwargs):
        raise AssertionError("the text is opened")

    monkeypatch.setattr("saejax.subjects.harvest.load_contexts", never)
    a_context = 15 * 2 * subject.d_model + 4 * (3 + 16 + 1)
    least = int(0.95 * 200) * a_context  # shards need not hold all that is asked for
    cfg = dataclasses.replace(cfg, **{"tokens": None, field: 3000})
    small = dataclasses.replace(cfg, max_bytes=least - 1)
    message = rf"Harvest\.max_bytes = {least - 1}: the activations need {least} bytes"
    for call in (
        lambda cfg: harvest(cfg, tmp_path / "s", str, subject=subject),
        lambda cfg: HarvestRun(data=cfg).plan(),
    ):
        with pytest.raises(ValueError, match=message):
            call(small)
        for fitting in (dataclasses.replace(cfg, max_bytes=least), cfg):
            with pytest.raises(AssertionError, match="is opened"):
                call(fitting)
    assert not (tmp_path / "s").exists()
    for split in {"tokens": "held_out", "held_out_tokens": "train"}[field], "train", "held_out":
        expected = AssertionError if (split == "train") != (field == "tokens") else ValueError
        with pytest.raises(expected):
            harvest(small, tmp_path / "s", str, subject=subject, splits=(split,))


def test_non_finite_activations_are_refused_by_document(cfg, subject, tmp_path):
    broken = jax.tree.map(lambda x: np.asarray(x) * np.float32(np.nan), subject.params)
    with pytest.raises(ValueError, match=r"NaN or inf.*'1\.resid_post'.*shard \d+, first in m\d\d"):
        harvest(cfg, tmp_path, str, subject=dataclasses.replace(subject, params=broken))
    assert open_store(tmp_path / "train").committed() == []


def test_free_space_is_checked_first(tmp_path):
    assert check_free_space(str(tmp_path / "not" / "yet"), 10) > 10
    assert check_free_space("gs://bucket/place", 10**18) is None
    with pytest.raises(OSError, match=r"need 1000000000\.00 GB"):
        check_free_space(str(tmp_path), 10**18)


@pytest.mark.parametrize("available", [1, 2, 7, 63, 64, 65, 100, 1386, 40_224])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_shards_waste_few_contexts(available, share):
    goal = max(1, round(available * share))
    size, n_shards = plan_shards(available, goal, 1024)
    assert n_shards >= 1 and size * n_shards <= available and size & (size - 1) == 0
    assert abs(size * n_shards - goal) <= 0.05 * goal
    assert size <= 1024
    if size < 1024:  # the next larger size would have missed the goal
        larger = min(max(1, round(goal / (2 * size))), available // (2 * size))
        assert abs(larger * 2 * size - goal) > 0.05 * goal


def test_many_sites_come_from_one_forward_pass(clean, cfg, subject, tmp_path):
    cfg = dataclasses.replace(cfg, tokens=3000, sites=("0.mlp_out", "1.resid_post"))
    assert cfg.all_sites == ("1.resid_post", "0.mlp_out")
    passes = []
    real = make_forward(subject, cfg.all_sites, "float32", batch=32, contexts=64)

    def forward(tokens, length):
        passes.append(len(tokens))
        return real(tokens, length)

    stores = harvest(cfg, tmp_path / "both", str, subject=subject, forward=forward)
    n_shards = sum(store.spec.n_shards for store in stores["0.mlp_out"])
    assert len(passes) == n_shards
    for site in cfg.all_sites:
        alone = dataclasses.replace(cfg, site=site, sites=())
        harvest(alone, tmp_path / "alone" / site, str, subject=subject)
        for split in SPLITS:
            both = content(tmp_path / "both" / site / split)
            assert both == content(tmp_path / "alone" / site / split)
    # A shard that one site lacks is computed again, and written for that site alone.
    record = tmp_path / "both/0.mlp_out/train/commits/000001.json"
    before = content(tmp_path / "both")
    record.unlink()
    passes.clear()
    other = tmp_path / "both/1.resid_post/train/acts/c/1/0"
    written = other.stat().st_mtime_ns
    harvest(cfg, tmp_path / "both", str, subject=subject, forward=forward)
    assert len(passes) == 1 and content(tmp_path / "both") == before
    assert other.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="has no layer 7"):
        harvest(dataclasses.replace(cfg, sites=("7.mlp_out",)), tmp_path / "x", str)


@pytest.mark.parametrize(("batch", "shards"), [(8, 1), (8, 4), (64, 1)])
def test_any_number_of_devices_gives_the_same_store(clean, cfg, subject, batch, shards, tmp_path):
    """Eight devices of one row of contexts each, two of four devices each, and one alone."""
    cfg = dataclasses.replace(cfg, batch_contexts=batch, subject_shards=shards)
    train, _ = harvest(cfg, tmp_path, str, subject=subject)[cfg.site]
    for chunk in (0, train.chunks[0] - 1):
        ours = train.read_chunk(0, chunk).result().astype(np.float32)
        theirs = clean[1][0].read_chunk(0, chunk).result().astype(np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=1e-2)
    with pytest.raises(ValueError, match=r"subject_shards = 9: this process has 8 devices"):
        sharded = dataclasses.replace(cfg, subject_shards=9)
        harvest(sharded, tmp_path / "x", str, subject=subject)


def test_a_store_is_not_continued_on_what_rounds_otherwise(cfg, subject, tmp_path):
    """Unless that is accepted, and then the records say so; a finished store is only read."""
    run = functools.partial(harvest, workdir=tmp_path, log=str, subject=subject, splits=("train",))
    (train,) = run(cfg)[cfg.site]
    (how,) = train.manifest["computations"]
    assert how["platform"] == "cpu" and how["batch_contexts"] == cfg.batch_contexts
    assert how["jax"] == jax.__version__ and train.record(1)["computation"] == how
    other = dataclasses.replace(cfg, batch_contexts=2 * cfg.batch_contexts)
    run(other)
    manifest, record = (tmp_path / f"train/{f}.json" for f in ("manifest", "commits/000001"))
    record.unlink()
    manifest.unlink()
    before = content(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"train was begun otherwise .*: batch_contexts was 32, is 64\. .*"
        r"Harvest.allow_other_computation = True",
    ):
        run(other)
    assert content(tmp_path) == before
    (train,) = run(dataclasses.replace(other, allow_other_computation=True))[cfg.site]
    assert train.manifest["computations"] == [how, how | {"batch_contexts": 64}]
    assert train.record(1)["computation"]["batch_contexts"] == 64
    for shard in train.committed():  # nothing is there that would be rounded otherwise
        (tmp_path / f"train/commits/{shard:06d}.json").unlink()
    manifest.unlink()
    (train,) = run(dataclasses.replace(cfg, batch_contexts=16))[cfg.site]
    assert train.manifest["computations"] == [how | {"batch_contexts": 16}]


def test_a_store_of_before_is_not_written_to(cfg, subject, tmp_path):
    """One whose records do not say how its rows were computed."""
    (train,) = harvest(cfg, tmp_path, str, subject=subject, splits=("train",))[cfg.site]
    path = tmp_path / "train/manifest.json"
    for file in [*(tmp_path / "train/commits").iterdir(), path]:
        content = records.unseal(file.read_bytes(), file.name)
        content.pop("computation", None), content.pop("computations", None)
        file.write_bytes(records.seal(content))
    before = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    train = open_store(tmp_path / "train")
    assert train.finish(train.manifest["provenance"]) == records.unseal(before, "manifest")
    assert path.stat().st_mtime_ns == stamp


class HostSubject:
    """A subject that runs outside JAX, as the adapter for PyTorch models does."""

    def __init__(self, subject):
        for name in ("name", "family", "revision", "fingerprint", "tokenizer", "max_context"):
            setattr(self, name, getattr(subject, name))
        for name in ("vocab_size", "check_site", "resolve_site", "width"):
            setattr(self, name, getattr(subject, name))
        self._subject = subject
        self.lengths = []

    def capture_host(self, batch, sites, length=None):
        self.lengths.append(length)
        return self._subject.capture_host(batch, sites)


def test_a_subject_on_the_host_feeds_the_same_shards(clean, cfg, subject, tmp_path):
    host = HostSubject(subject)
    train, held_out = harvest(cfg, tmp_path, str, subject=host)[cfg.site]
    ours = train.read_chunk(0, 0).result().astype(np.float32)
    theirs = clean[1][0].read_chunk(0, 0).result().astype(np.float32)
    np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=1e-2)
    contexts = sum(s.spec.n_shards * s.spec.contexts_per_shard for s in (train, held_out))
    assert sum(map(len, host.lengths)) == contexts


def test_a_subject_on_the_host_is_not_asked_for_what_it_cannot_do(cfg, subject, tmp_path):
    host = HostSubject(subject)
    host.dtype = "float32"
    with pytest.raises(ValueError, match=r"subject_shards = 2: .* runs outside JAX.*set it to 1"):
        harvest(dataclasses.replace(cfg, subject_shards=2), tmp_path / "s", str, subject=host)
    with pytest.raises(ValueError, match=r"dtype = 'bfloat16': .* was loaded in float32"):
        harvest(dataclasses.replace(cfg, dtype="bfloat16"), tmp_path / "s", str, subject=host)
    host.takes, host.tokenizer = "pixels", None
    with pytest.raises(ValueError, match=r"takes pixels, and Harvest.text = @Text.*give .*@Images"):
        harvest(cfg, tmp_path / "s", str, subject=host)
    assert not (tmp_path / "s").exists()


def test_a_torch_subject_is_loaded_in_the_type_asked_for(cfg, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "saejax.subjects.request.load_subject", lambda name, **options: asked.append(options)
    )
    for name in ("torch:x/y", "embedded"):
        open_subject(dataclasses.replace(cfg, subject=name, dtype="bfloat16"))
    assert [options["dtype"] for options in asked] == ["bfloat16", "float32"]


def test_an_alias_is_stored_by_the_canonical_name(cfg, subject, tmp_path):
    small = dataclasses.replace(cfg, tokens=500, site="blocks.1.hook_resid_post")
    stores = harvest(small, tmp_path / "a", str, subject=subject, splits=("train",))
    assert stores[small.site][0].spec.site == "1.resid_post"
    both = dataclasses.replace(small, sites=("0.mlp_act",))
    harvest(both, tmp_path / "b", str, subject=subject, splits=("train",))
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"1.resid_post", "0.mlp_hidden"}
    twice = dataclasses.replace(small, sites=("1.resid_post",))
    with pytest.raises(ValueError, match=r"'blocks.1.hook_resid_post' and '1.resid_post' are the"):
        harvest(twice, tmp_path / "c", str, subject=subject)
    assert not (tmp_path / "c").exists()


def test_without_space_nothing_is_made_and_what_is_there_is_not_asked_for_again(
    clean, cfg, subject, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("saejax.subjects.harvest.shutil.disk_usage", lambda folder: usage)
    lines = []
    with pytest.raises(OSError, match="Free some space"):
        harvest(cfg, tmp_path / "s", lines.append, subject=subject)
    assert "the tokens asked for need 0.0 GB; it will fail once the text is read" in lines[0]
    assert not (tmp_path / "s").exists()
    lines.clear()
    harvest(cfg, clean[0], lines.append, subject=subject)  # all of it is stored
    assert lines == []


def test_what_lacks_a_file_is_no_missing_store(clean, tmp_path):
    store, path = clean[1][0], tmp_path / "train"
    everything = list(range(store.spec.n_shards))
    assert missing_at(str(path), store.spec) == everything
    shutil.copytree(store.path, path)
    assert missing_at(str(path), store.spec) == []
    (path / "acts/zarr.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"acts/zarr\.json is missing; restore it"):
        missing_at(str(path), store.spec)
    (path / "spec.json").unlink()
    assert missing_at(str(path), store.spec) == everything


def test_ids_made_elsewhere_need_no_tokenizer(cfg, subject, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(EMBEDDED / name, tmp_path / name)
    ids = np.random.default_rng(0).integers(0, subject.vocab_size, (40, 16))
    ids[:, 5] = 0  # ends texts
    np.save(tmp_path / "ids.npy", ids)
    text = TokensConfig(source=str(tmp_path / "ids.npy"), held_out_percent=20.0)
    cfg = dataclasses.replace(cfg, subject=str(tmp_path), text=text, tokens=None)
    train, _ = harvest(cfg, tmp_path / "s", str)[cfg.site]
    assert train.manifest["provenance"]["tokenizer_fingerprint"] == "ids below 4096, special [0]"
    assert train.manifest["left_out"]["bos"] > 0  # as config.json has it
    bare = dataclasses.replace(subject, tokenizer=None)
    train, _ = harvest(cfg, tmp_path / "t", str, subject=bare)[cfg.site]
    with pytest.raises(ValueError, match=r"without a tokenizer, so Harvest\.text cannot"):
        harvest(dataclasses.replace(cfg, text=TextConfig()), tmp_path / "u", str, subject=bare)
    np.save(tmp_path / "ids.npy", ids + 4096)
    with pytest.raises(ValueError, match="outside the tokenizer's vocabulary"):
        harvest(cfg, tmp_path / "v", str)


def test_ids_that_only_the_tokenizer_knows_are_refused(cfg, subject, tmp_path):
    """Not clamped to the last row of the embedding, silently."""
    small = dataclasses.replace(subject.config, vocab_size=100)
    small = dataclasses.replace(subject, config=small)
    with pytest.raises(ValueError, match=r"train split: token id \d+ is outside .*\(0 \.\. 99\)"):
        harvest(cfg, tmp_path / "s", str, subject=small)
    assert not (tmp_path / "s").exists()


def test_weights_go_straight_to_the_devices(cfg, subject, tmp_path, monkeypatch):
    """In the layout of the pass, where `place` then has nothing to move."""
    meshes = []

    def load(name, *, mesh, **options):
        meshes.append(mesh)
        return load_subject(name, mesh=mesh, **options)

    monkeypatch.setattr("saejax.subjects.request.load_subject", load)
    cfg = dataclasses.replace(cfg, subject_shards=2, tokens=500)
    loaded = harvest(cfg, tmp_path / "a", str, splits=("train",))
    given = harvest(cfg, tmp_path / "b", str, subject=subject, splits=("train",))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert loaded[cfg.site][0].spec == given[cfg.site][0].spec
    assert [dict(mesh.shape) for mesh in meshes] == [{"data": 2, "latent": 2}]
    first = load("embedded", mesh=own_mesh(2, 2))
    assert all(
        one.sharding == two.sharding and not isinstance(one, np.ndarray)
        for one, two in zip(
            jax.tree.leaves(first.params), jax.tree.leaves(subject.place(own_mesh(2, 2)).params)
        )
    )


def test_padding_and_special_tokens_are_left_out_and_counted(cfg, subject, tmp_path):
    """Tails padded, a BOS before every context: rows are the subject's at real tokens only."""
    text = dataclasses.replace(cfg.text, tails="pad", min_tail=3, bos="context")
    cfg = dataclasses.replace(cfg, text=text, contexts_per_shard=16, tokens=None)
    train, _ = harvest(cfg, tmp_path, str, subject=subject)[cfg.site]
    contexts = load_contexts(cfg.text, "train", subject.tokenizer, cfg.context_length)
    ids = np.concatenate([train.read_contexts(s)[:, 0] for s in train.committed()]).astype(int)
    assert (contexts.length[ids] < 16).any()
    padding = (16 - contexts.length[ids]).sum()
    manifest = train.manifest
    assert manifest["left_out"]["padding"] == padding and manifest["left_out"]["bos"] == 0
    assert manifest["rows"] + sum(manifest["left_out"].values()) == 16 * len(ids)
    assert manifest["left_out"]["first_positions"] == len(ids)  # each is a BOS
    batches = Loader(train, 16)
    capture = jax.jit(lambda params, t: subject.capture(params, t, (cfg.site,))[cfg.site])
    for step in range(min(4, train.n_rows // 16)):
        rows, where = batches.batch(step).astype(np.float32), batches.provenance(step)
        for row, (shard, context, position) in zip(rows, where):
            table = train.read_contexts(int(shard))[context]
            assert contexts.keep[table[0], position]
            acts = np.asarray(capture(subject.params, table[None, 3:].astype(np.int32)))
            np.testing.assert_allclose(row, acts[0, position], rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("host", [False, True])
def test_first_position_and_special_tokens_are_stored_where_asked_for(cfg, subject, tmp_path, host):
    text = dataclasses.replace(cfg.text, tails="pad", min_tail=3, bos="context")
    cfg = dataclasses.replace(cfg, text=text, contexts_per_shard=16, tokens=None)
    cfg = dataclasses.replace(cfg, max_norm_ratio=None)
    asked = HostSubject(subject) if host else subject
    masked = dataclasses.replace(cfg, first_position=0)
    for keep, cfg in ((False, masked), (True, dataclasses.replace(masked, keep_special=True))):
        store = harvest(cfg, tmp_path / str(keep), str, subject=asked, splits=("train",))
        store = store[cfg.site][0]
        left_out = {why: n for why, n in store.manifest["left_out"].items() if n}
        assert (left_out.pop("bos", 0) == 0) == keep and left_out["padding"]
        assert set(left_out) <= {"padding", "last_chunk"}
        rows = store.read_shard_rows(0)
        acts = subject.capture_host(rows.tokens.astype(np.int32), (cfg.site,))[cfg.site]
        assert (rows.tokens[:, 0] == subject.tokenizer.bos_id).all()
        assert rows.stored[:, 0].any() == keep and rows.stored[:, 1].any()
        error = np.abs(acts - rows.rows.astype(np.float32))[rows.stored]
        assert (error <= 2.0**-8 * np.abs(acts[rows.stored]) + 1e-2).all()
        assert store.manifest["provenance"]["keep_special"] == keep


def test_every_masked_position_has_its_reason():
    tokens = np.array([[9, 4, 8, 5, 0], [9, 9, 4, 4, 4]])
    keep = np.array([[False, True, False, True, False], [False, False, True, True, True]])
    codes = mask_codes(tokens, keep, np.array([4, 5]), bos=9)
    names = [[MASKED[code] for code in row] for row in codes]
    assert names == [
        ["bos", "kept", "special", "kept", "padding"], ["bos", "bos", "kept", "kept", "kept"],
    ]  # fmt: skip


def test_the_embedded_model_has_no_outlying_norms(clean):
    """So that the default filter leaves a store as it was without it."""
    for store in clean[1]:
        assert store.manifest["left_out"]["norm"] == store.manifest["left_out"]["bos"] == 0
        assert store.spec.max_norm_ratio == 10.0


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
"""


def test_a_full_disk_is_one_message_and_freed_space_continues(clean, cfg, tmp_path):
    """A limit on the size of a file makes the write of every whole shard fail for real."""
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name != "text"}
    code = CHILD.format(root=str(ROOT), fields=fields, text=dataclasses.asdict(cfg.text))
    head, _, call = code.rpartition("\nh.harvest")
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    full = subprocess.run(
        [sys.executable, "-c", f"{head}\n{FULL}\nh.harvest{call}", str(tmp_path)],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert full.returncode == 1
    assert "no space left; free some and run again" in full.stderr.splitlines()[-1]
    assert open_store(tmp_path / "train").committed() == []
    assert not list(tmp_path.glob("train/acts/c/*/0"))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env)
    assert done.returncode == 0 and content(tmp_path) == content(clean[0])


def test_bfloat16_is_what_is_stored(clean):
    assert clean[1][0].read_chunk(0, 0).result().dtype == ml_dtypes.bfloat16
