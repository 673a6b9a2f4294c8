"""The activation store: what is written is read back, and nothing damaged is ever read."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import ml_dtypes
import numpy as np
import pytest

from saejax.data.layout import permutation, position_order
from saejax.data.shards import CorruptStoreError, StoreSpec, open_store

SPEC = StoreSpec(
    subject="tiny",
    subject_fingerprint="aa",
    text_fingerprint="bb",
    split="train",
    site="1.resid_post",
    d_model=8,
    context_length=6,
    contexts_per_shard=4,
    n_shards=3,
)
NAMES = ("a.py", "b.py", "c.py")


def shard_arrays(spec, shard):
    """A pure function of (spec, shard)."""
    rng = np.random.default_rng([7, shard])
    n = spec.contexts_per_shard
    acts = rng.normal(0.3, 2.0, (n, spec.rows_per_context, spec.d_model)).astype(np.float32)
    ids = np.arange(shard * n, (shard + 1) * n)
    tokens = rng.integers(0, 60_000, (n, spec.context_length)).astype(np.uint16)
    return acts, {"tokens": tokens, "context": ids, "document": ids % 3, "offset": ids * 6}


def fill(path, spec=SPEC, shards=None):
    store = open_store(path, spec, "w")
    store.write_documents(NAMES)
    for shard in shards if shards is not None else range(spec.n_shards):
        acts, where = shard_arrays(spec, shard)
        assert store.write_shard(shard, acts, **where)
    return store


def finished(path, spec=SPEC):
    store = fill(path, spec)
    store.finish({"note": "test"})
    return open_store(path)


def bits(array):
    return np.asarray(array).view(np.uint16)


def files(path):
    return sorted(str(p.relative_to(path)) for p in pathlib.Path(path).rglob("*") if p.is_file())


@pytest.mark.parametrize("place", ["{}/plain", "file://{}/url", "{}/odd na#me?%20", "memory://m/x"])
def test_round_trip_in_context_order(tmp_path, place):
    store = finished(place.format(tmp_path))
    assert store.committed() == [0, 1, 2]
    assert store.documents == NAMES
    for shard in range(3):
        acts, where = shard_arrays(SPEC, shard)
        got = store.read_shard_rows(shard)
        np.testing.assert_array_equal(bits(got.rows), bits(acts.astype(ml_dtypes.bfloat16)))
        for name in ("tokens", "context", "document", "offset"):
            np.testing.assert_array_equal(getattr(got, name), where[name])
    store.verify()


def test_a_chunk_holds_one_row_of_each_context_at_its_position(tmp_path):
    store = finished(tmp_path / "s")
    for shard in range(3):
        acts = shard_arrays(SPEC, shard)[0].astype(ml_dtypes.bfloat16)
        seen = []
        for chunk in range(SPEC.rows_per_context):
            rows = store.read_chunk(shard, chunk).result()
            assert rows.shape == (4, 8)
            for slot in range(4):
                context, position = (int(found[slot]) for found in store.where(shard, chunk))
                expected = acts[context, position - SPEC.first_position]
                np.testing.assert_array_equal(bits(rows[slot]), bits(expected))
                assert context == slot
                seen.append((context, position))
        assert sorted(seen) == [(s, p) for s in range(4) for p in range(1, 6)]
    assert [shard for _, shard, _ in store.rows()] == [0] * 5 + [1] * 5 + [2] * 5


def test_orders_are_what_stored_data_was_written_with():
    """Changing these numbers would make every stored row's position wrong."""
    assert permutation(8, 3, 1, 2).tolist() == [0, 7, 4, 1, 5, 2, 6, 3]
    assert position_order(0, 1, 3, 5).tolist() == [
        [4, 2, 1, 0, 3],
        [4, 0, 1, 3, 2],
        [4, 3, 2, 1, 0],
    ]


def test_manifest_statistics_match_float64(tmp_path):
    manifest = finished(tmp_path / "s").manifest
    acts = np.stack([shard_arrays(SPEC, i)[0] for i in range(3)]).astype(ml_dtypes.bfloat16)
    rows = acts.astype(np.float64).reshape(-1, 8)
    norms = np.linalg.norm(acts.astype(np.float64), axis=-1)
    assert manifest["rows"] == 60 and manifest["contexts"] == 12 and manifest["documents"] == 3
    np.testing.assert_allclose(manifest["mean"], rows.mean(0), rtol=1e-12)
    variance = ((rows - rows.mean(0)) ** 2).sum(1).mean()
    np.testing.assert_allclose(manifest["total_variance"], variance, rtol=1e-12)
    np.testing.assert_allclose(manifest["mean_norm"], norms.mean(), rtol=1e-12)
    np.testing.assert_allclose(manifest["norm_by_position"], norms.mean((0, 1)), rtol=1e-12)
    rms = np.sqrt((norms**2).mean((0, 1)))
    np.testing.assert_allclose(manifest["rms_norm_by_position"], rms, rtol=1e-12)
    assert manifest["provenance"] == {"note": "test"}


def test_another_spec_is_refused_naming_each_field(tmp_path):
    fill(tmp_path / "s")
    other = dataclasses.replace(SPEC, site="2.mlp_out", seed=5)
    with pytest.raises(ValueError, match=r"site: stored '1.resid_post', wanted '2.mlp_out'.*seed"):
        open_store(tmp_path / "s", other, "w")
    with pytest.raises(ValueError, match="d_model: stored 8, wanted 9"):
        open_store(tmp_path / "s", dataclasses.replace(SPEC, d_model=9), "w")
    assert SPEC.fingerprint() != other.fingerprint()


def test_the_beginning_of_another_store_is_refused(tmp_path):
    """A creator of another spec was killed between the array headers and spec.json."""
    open_store(tmp_path / "s", SPEC, "w")
    (tmp_path / "s" / "spec.json").unlink()
    with pytest.raises(ValueError, match=r"beginning of a store of another spec.*acts.*delete"):
        open_store(tmp_path / "s", dataclasses.replace(SPEC, d_model=9), "w")
    finished(tmp_path / "s").verify()  # the same spec goes on


def check_everything(path):
    store = open_store(path)
    store.verify()
    assert store.documents == NAMES


def test_every_damage_to_every_file_is_detected(tmp_path):
    path = tmp_path / "s"
    finished(path)
    everything = files(path)
    assert (
        len(everything) == 14
    )  # spec, documents, manifest, 2 headers, 3 x (acts, contexts, commit)
    check_everything(path)
    rng = random.Random(0)
    for name in everything:
        whole = (path / name).read_bytes()
        places = {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(8))}
        damaged = [
            whole[:p] + bytes([whole[p] ^ (1 << rng.randrange(8))]) + whole[p + 1 :] for p in places
        ]
        for content in [*damaged, whole[: len(whole) // 2], b"", None]:
            (path / name).unlink()
            if content is not None:
                (path / name).write_bytes(content)
            with pytest.raises((CorruptStoreError, FileNotFoundError, ValueError)) as error:
                check_everything(path)
            if content is not None or not name.startswith("commits"):
                assert name.split("/")[0] in str(error.value), name
            if content is None:
                (path / name).touch()
        (path / name).write_bytes(whole)
    check_everything(path)


def test_errors_name_file_shard_and_chunk(tmp_path):
    store = finished(tmp_path / "s")
    shard_file = tmp_path / "s" / "acts" / "c" / "1" / "0"
    content = bytearray(shard_file.read_bytes())
    content[70] ^= 1  # chunk 1 of shard 1: chunks are 4 x 8 x 2 bytes and 4 of checksum
    shard_file.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=r"acts/c/1/0 \(shard 1, chunk 1\).*[Dd]igest"):
        store.read_chunk(1, 1).result()
    store.read_chunk(1, 0).result()  # the other chunks are untouched
    shard_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"acts/c/1/0 \(shard 1, chunk 2\) is missing"):
        store.read_chunk(1, 2).result()  # not zeros
    with pytest.raises(IndexError, match="no chunk 5"):
        store.read_chunk(0, 5)


def test_swapped_shards_are_detected(tmp_path):
    """Every checksum of the two files is right; only the commit record knows better."""
    store = finished(tmp_path / "s")
    acts = tmp_path / "s" / "acts" / "c"
    (acts / "1" / "0").rename(acts / "kept")
    (acts / "2" / "0").rename(acts / "1" / "0")
    (acts / "kept").rename(acts / "2" / "0")
    with pytest.raises(CorruptStoreError, match=r"commits/000001.json"):
        store.read_shard_rows(1)


def test_zeros_are_stored_as_zeros(tmp_path):
    store = open_store(tmp_path / "s", dataclasses.replace(SPEC, n_shards=1), "w")
    acts, where = shard_arrays(SPEC, 0)
    store.write_shard(0, np.zeros_like(acts), **where)
    assert (store.read_shard_rows(0).rows == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_non_finite_values_are_refused(tmp_path, value):
    store = open_store(tmp_path / "s", SPEC, "w")
    store.write_documents(NAMES)
    acts, where = shard_arrays(SPEC, 1)
    acts[2, 1, 3] = acts[3, 0, 0] = value  # 3.4e38 is finite in float32, infinite in bfloat16
    with pytest.raises(ValueError, match=r"^2 NaN or inf.*'1.resid_post', in 2 .*shard 1.*a\.py"):
        store.write_shard(1, acts, **where)
    assert store.committed() == [] and not any("/c/" in name for name in files(tmp_path / "s"))


def test_wrong_shapes_and_indices_are_refused(tmp_path):
    store = open_store(tmp_path / "s", SPEC, "w")
    acts, where = shard_arrays(SPEC, 0)
    with pytest.raises(ValueError, match=r"shape \(4, 5, 7\)"):
        store.write_shard(0, acts[..., :7], **where)
    with pytest.raises(ValueError, match="no shard 3"):
        store.write_shard(3, acts, **where)
    with pytest.raises(ValueError, match="unfinished, 3 of 3 shards"):
        store.finish()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        _ = store.manifest
    with pytest.raises(FileNotFoundError, match=r"spec\.json"):
        open_store(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"first_position = 6"):
        dataclasses.replace(SPEC, first_position=6)


def test_a_committed_shard_is_never_written_again(tmp_path):
    store = fill(tmp_path / "s", shards=[1])
    before = (tmp_path / "s" / "acts" / "c" / "1" / "0").stat().st_mtime_ns
    acts, where = shard_arrays(SPEC, 1)
    assert not open_store(tmp_path / "s", SPEC, "w").write_shard(1, acts + 1, **where)
    assert (tmp_path / "s" / "acts" / "c" / "1" / "0").stat().st_mtime_ns == before
    assert store.committed() == [1]


class Overtaken(np.ndarray):
    """Activations that let another writer commit just after the check for a record."""

    def astype(self, *args, **kwargs):
        other, shard, (acts, where) = self.race
        assert other.write_shard(shard, acts, **where)
        return np.asarray(self).astype(*args, **kwargs)


@pytest.mark.parametrize("same", [True, False])
def test_a_record_that_appears_before_the_write_keeps_its_bytes(tmp_path, same):
    first, second = (open_store(tmp_path / "s", SPEC, "w") for _ in range(2))
    acts, where = shard_arrays(SPEC, 0)
    late = (acts if same else acts + 1).view(Overtaken)
    late.race = first, 0, (acts, where)
    if same:
        assert second.write_shard(0, late, **where) is False
    else:
        with pytest.raises(ValueError, match=r"000000.json: another writer .* which is whole"):
            second.write_shard(0, late, **where)
    second.read_shard_rows(0)
    assert first.committed() == [0]


@pytest.mark.parametrize("same", [True, False])
def test_the_loser_of_a_race_commits_nothing(tmp_path, monkeypatch, same):
    first, second = (open_store(tmp_path / "s", SPEC, "w") for _ in range(2))
    acts, where = shard_arrays(SPEC, 0)
    begin = second._start_writes

    def overtaken(*args):
        assert first.write_shard(0, acts, **where)
        return begin(*args)

    monkeypatch.setattr(second, "_start_writes", overtaken)
    if same:
        assert second.write_shard(0, acts, **where) is False
        second.read_shard_rows(0)
    else:
        with pytest.raises(ValueError, match=r"000000.json: another writer .* is in doubt"):
            second.write_shard(0, acts + 1, **where)
        with pytest.raises(CorruptStoreError):
            second.read_shard_rows(0)
    assert first.committed() == [0]


def test_a_subject_by_another_path_is_the_same_and_older_records_are_read(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(StoreSpec, "fingerprint", StoreSpec.former_fingerprint)
        fill(tmp_path / "s", shards=[0])
    moved = dataclasses.replace(SPEC, subject="./models/tiny")
    assert moved.fingerprint() == SPEC.fingerprint()
    fill(tmp_path / "s", moved, shards=[1, 2]).finish()
    store = open_store(tmp_path / "s", moved)
    store.verify()
    assert store.spec.subject == "tiny" and len(store.committed()) == 3


def test_tokens_before_the_documents_own_are_no_part_of_an_offset(tmp_path):
    store = fill(tmp_path / "s")
    store.finish({"lead": 1})
    again = open_store(tmp_path / "s")
    assert again.lead == 1 and finished(tmp_path / "other").lead == 0
    np.testing.assert_array_equal(again.read_shard_rows(0).offset, [-1, 5, 11, 17])


def test_many_records_are_read_in_order_and_their_sums_not_kept(tmp_path):
    spec = dataclasses.replace(SPEC, n_shards=70)  # more than are read at once
    store = fill(tmp_path / "s", spec)
    assert [found["shard"] for found in store._commits.whole(range(70))] == list(range(70))
    assert not {"sum", "norm_sum"} & set(store.record(3)) and store.record(3)["rows"] == 20
    (tmp_path / "s" / "commits" / "000066.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"000066\.json is missing"):
        list(store._commits.whole(range(70)))


BIG = dataclasses.replace(SPEC, d_model=256, contexts_per_shard=128, context_length=17, n_shards=10)
ROOT = pathlib.Path(__file__).parents[2]


def python(code, *args, **kwargs):
    """A child that can run the functions of this file."""
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests/unit')!r}]\n"
        + textwrap.dedent(code)
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True, **kwargs
    )


WRITER = """
    import test_shards as t
    print("ready", flush=True)
    store = t.open_store(sys.argv[1], t.BIG, "w")
    store.write_documents(t.NAMES)
    for shard in list(range(t.BIG.n_shards))[:: int(sys.argv[2])]:
        if shard not in store.committed():
            acts, where = t.shard_arrays(t.BIG, shard)
            print(shard, store.write_shard(shard, acts, **where), flush=True)
    store.finish()
"""


def content(path):
    return {name: (path / name).read_bytes() for name in files(path)}


def test_killed_and_concurrent_writers_leave_the_same_store(tmp_path):
    clean = fill(tmp_path / "clean", BIG)
    clean.finish()
    rng, kills = random.Random(0), 0
    for _ in range(4):
        writers = [python(WRITER, tmp_path / "torn", step) for step in (1, -1)]
        for writer in writers:
            writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.12))
        for writer in writers:
            kills += writer.poll() is None
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        if (tmp_path / "torn" / "spec.json").exists():
            for shard in open_store(tmp_path / "torn").committed():
                open_store(tmp_path / "torn").read_shard_rows(shard)  # committed means whole
    assert kills
    writers = [python(WRITER, tmp_path / "torn", step) for step in (1, -1)]
    printed = "".join(writer.communicate()[0] for writer in writers)
    assert all(writer.returncode == 0 for writer in writers)
    won = [line for line in printed.splitlines() if line.endswith("True")]
    assert len(won) == len(set(won)) <= BIG.n_shards
    open_store(tmp_path / "torn").verify()
    torn = {name: data for name, data in content(tmp_path / "torn").items() if "__lock" not in name}
    assert torn == content(tmp_path / "clean")


def test_a_read_only_place_is_one_clear_error(tmp_path):
    (tmp_path / "s").mkdir()
    for folder in (*reversed(tmp_path.parents[:3]), tmp_path):
        folder.chmod(0o755)
    (tmp_path / "s").chmod(0o555)
    child = python(
        """
        import os
        import test_shards as t
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            t.open_store(sys.argv[1], t.SPEC, "w")
        except PermissionError as error:
            print(error)
        """,
        tmp_path / "s",
    )
    assert "no permission, or read-only" in child.communicate()[0]


def test_a_full_disk_is_one_clear_error_and_leaves_no_shard(tmp_path):
    """A limit on the size of a file makes the same write fail for real."""
    child = python(
        """
        import resource
        import test_shards as t
        store = t.open_store(sys.argv[1], t.BIG, "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            acts, where = t.shard_arrays(t.BIG, 0)
            store.write_shard(0, acts, **where)
        except OSError as error:
            print(error, store.committed())
        """,
        tmp_path / "s",
    )
    out = child.communicate()[0]
    assert "acts/c/0/0: no space left" in out and out.endswith("[]\n")
    assert not (tmp_path / "s" / "acts" / "c" / "0" / "0").exists()
    acts, where = shard_arrays(BIG, 0)
    assert open_store(tmp_path / "s", BIG, "w").write_shard(0, acts, **where)


def test_commit_record_holds_what_the_design_promises(tmp_path):
    fill(tmp_path / "s")
    record = json.loads((tmp_path / "s" / "commits" / "000002.json").read_text())
    assert record["shard"] == 2 and record["rows"] == 20 and record["spec"] == SPEC.fingerprint()
    assert len(record["sha256"]) == 64 and len(record["sum"]) == 8
    assert len(record["norm_sum"]) == len(record["sq_norm_sum"]) == 5
    header = json.loads((tmp_path / "s" / "acts" / "zarr.json").read_text())
    sharding = header["codecs"][0]["configuration"]
    assert header["data_type"] == "bfloat16" and header["chunk_grid"]["configuration"][
        "chunk_shape"
    ] == [20, 8]
    assert [codec["name"] for codec in sharding["codecs"]] == ["bytes", "crc32c"]
    assert [codec["name"] for codec in sharding["index_codecs"]] == ["bytes", "crc32c"]
    assert sorted(os.listdir(tmp_path / "s" / "acts" / "c")) == ["0", "1", "2"]
