"""A harvest alone: its plan on paper, its folder, and what it refuses."""

import dataclasses
import re

import pytest

from saejax.data.corpus import TextConfig
from saejax.data.shards import open_store
from saejax.data.storage import describe_stream, duration, plan_of, plan_store, size
from saejax.exits import DONE
from saejax.harvest_run import HarvestRun
from saejax.subjects.harvest import HarvestConfig


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    line = "def f(x):\n    '''Adds.'''\n    return x + 1\n\n"
    for i in range(6):
        (folder / f"m{i}.py").write_text(f"import m{i}\n\n" + line * 20)
    text = TextConfig(source=str(folder), held_out_percent=20.0)
    return HarvestConfig(context_length=16, contexts_per_shard=8, batch_contexts=8, text=text)


def run(harvest, workdir, seed=0):
    given = {"operative_gin": f"# {seed}\n", "config_json": {"seed": seed}, "argv": ["saejax"]}
    return harvest.run(workdir, **given)


def test_it_fills_its_folder_and_runs_again(cfg, tmp_path):
    assert run(HarvestRun(data=cfg), tmp_path / "run") == DONE
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/activations").rglob("*")}
    for split in ("train", "held_out"):
        open_store(tmp_path / "run/activations" / split).verify()
    assert run(HarvestRun(data=cfg), tmp_path / "run") == DONE
    assert {p: p.stat().st_mtime_ns for p in made} == made
    with pytest.raises(ValueError, match=r"another configuration .*seed: 0 -> 1"):
        run(HarvestRun(data=cfg), tmp_path / "run", seed=1)


def test_reading_text_keeps_the_watchdog_quiet(cfg, tmp_path, monkeypatch, caplog):
    """Text may take hours: each line about it is a sign of life."""
    beats = []
    monkeypatch.setattr("saejax.data.progress.EVERY_SECONDS", 0.0)
    monkeypatch.setattr("saejax.watchdog.beat", lambda: beats.append(len(caplog.records)))
    caplog.set_level("INFO")
    for work in (lambda: run(HarvestRun(data=cfg), tmp_path), HarvestRun(data=cfg).plan):
        beats.clear()
        caplog.clear()
        work()
        told = [i for i, one in enumerate(caplog.messages) if "documents read" in one]
        assert len(told) == 18 and set(told) <= set(beats)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://x/y", r"= 'ftp://x/y': scheme 'ftp' .* local path or file://, gs:// or s3://"),
        ("{}/file/below/it", r"= '.*/file/below/it': .*/file is not a folder; give another path"),
        ("file://{}/file", r"= 'file://.*/file': .*/file is not a folder"),
    ],
)
def test_a_place_where_no_store_can_be_is_refused_by_its_setting(cfg, tmp_path, path, message):
    (tmp_path / "file").write_text("")
    harvest = HarvestRun(data=cfg, path=path.format(tmp_path))
    for work in (lambda: run(harvest, tmp_path / "run"), harvest.plan):
        with pytest.raises(ValueError, match=r"^HarvestRun\.path " + message):
            work()
    assert not (tmp_path / "run").exists()


def test_stores_go_where_they_are_told_to(cfg, tmp_path):
    run(HarvestRun(data=cfg, path=str(tmp_path / "elsewhere")), tmp_path / "run")
    assert open_store(tmp_path / "elsewhere/train").n_rows > 0
    assert not (tmp_path / "run/activations").exists()


def test_the_plan_is_that_of_the_stores_to_come(cfg, tmp_path):
    plan = HarvestRun(data=cfg, tokens_per_second=100.0).plan()
    run(HarvestRun(data=cfg), tmp_path / "run")
    for split in ("train", "held_out"):
        store = open_store(tmp_path / "run/activations" / split)
        spec = store.spec
        section = plan[plan.index(f"{split}: activations") :]
        assert f"{store.n_rows:,} a site" in section
        assert f"{spec.n_shards:,} a site, of {spec.contexts_per_shard} contexts" in section
        paper = plan_of([spec])
        assert paper.activation_bytes + paper.table_bytes == spec.n_shards * spec.bytes_per_shard
        records = sum(p.stat().st_size for p in (tmp_path / "run").glob(f"*/{split}/commits/*"))
        assert 0.5 * records < paper.record_bytes < 2 * records
    assert "at 100 tokens/s" in plan and "swap buffer" in plan
    with pytest.raises(ValueError, match="topology=cpu:8"):
        HarvestRun(data=cfg).plan("cpu:8")


def test_the_plan_reads_no_weights(cfg, monkeypatch):
    monkeypatch.setattr("saejax.subjects.hf.weights.load_params", None)
    assert "train: activations" in HarvestRun(data=cfg).plan()
    wrong = dataclasses.replace(cfg, site="9.resid_post")
    with pytest.raises(ValueError, match="has no layer 9"):
        HarvestRun(data=wrong).plan()


def test_forty_billion_tokens_need_no_subject(tmp_path):
    """40 B x 12288 in bfloat16 is 983 TB; nothing of it is at hand."""
    data = HarvestConfig(
        subject=str(tmp_path / "none"), tokens=40_000_000_000, contexts_per_shard=1024
    )
    plan = HarvestRun(data=data, width=12_288, tokens_per_second=1e6).plan()
    assert "983 TB" in plan and "620,040 a site" in plan and "1,860,120 files" in plan
    assert "11.3 h at 1,000,000 tokens/s" in plan
    buffer = 64 * 131_072 * (2 * 12_288 + 8)
    assert f"8,388,608 rows (64 batches): {size(buffer)}" in plan
    paper = plan_store(40_000_000_000, [12_288], 64)
    assert paper.rows == 620_040 * 1024 * 63 >= paper.tokens > paper.rows - 1024 * 63
    assert paper.activation_bytes == 2 * 12_288 * paper.rows
    assert any("24 width^2" in line for line in describe_stream(131_072, 12_288))
    assert "114 such layers" in "".join(describe_stream(131_072, 12_288, 2 * 12_288 * 2.0**24))
    with pytest.raises(ValueError, match=r"Harvest\.max_bytes = 1000"):
        small = HarvestConfig(tokens=1000, max_bytes=1000)
        HarvestRun(data=small, width=12).plan()
    whole = dataclasses.replace(data, first_position=0)
    assert "610,352 a site" in HarvestRun(data=whole, width=12).plan()  # 40e9 / 64 / 1024


def test_more_shards_than_a_store_may_have_are_named():
    plan = HarvestRun(data=HarvestConfig(tokens=10**12, contexts_per_shard=64), width=8).plan()
    assert "raise contexts_per_shard" in plan


@pytest.mark.parametrize(
    ("field", "value"), [("width", 0), ("tokens_per_second", -1.0), ("width", 8)]
)
def test_bad_fields_are_refused(cfg, field, value):
    with pytest.raises(ValueError, match=rf"HarvestRun\.{field} = {value}"):
        HarvestRun(data=cfg, **{field: value})  # the text's size is not known: tokens is None


def test_sizes_and_times_read_well():
    assert [size(n) for n in (999, 1.59e9, 9.83e14, 2e18)] == [
        "999 B", "1.59 GB", "983 TB", "2,000 PB",
    ]  # fmt: skip
    assert [duration(s) for s in (40, 400, 9000, 4e5, 1e9)] == [
        "40 s", "6.67 min", "2.5 h", "4.63 days", "31.7 years",
    ]  # fmt: skip
    assert not re.search(r"e\+", "".join(size(10.0**n) for n in range(18)))
