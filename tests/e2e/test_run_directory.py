"""What the command leaves behind: every file of a run, readable and agreeing with the others."""

import dataclasses
import hashlib
import html.parser
import json
import math
import pathlib
import re
import shutil
import struct

import numpy as np
import pytest
from absl import flags

import saejax
from saejax import config, main
from saejax.evals.suite import evaluate
from saejax.mesh import MeshShape, make_mesh
from saejax.sources import open_source

PROMISED = {
    "nmse",
    "explained_variance",
    "l0",
    "dead_fraction",
    "delta_ce",
    "delta_ce_zero_ablation",
    "delta_ce_mean_ablation",
    "kl",
    "tokens",
}
RECORD = {
    "step", "tokens", "nmse", "l0", "dead_fraction", "tokens_per_second", "wait_share",
    "learning_rate",
}  # fmt: skip


def read(path: pathlib.Path):
    return json.loads(path.read_text(encoding="utf-8"))


def figures(value, name=""):
    """Every number inside nested JSON, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from figures(item, f"{name}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from figures(item, f"{name}[{index}]")
    elif isinstance(value, int | float):
        yield name, value


def test_nothing_is_missing_and_nothing_is_left_over(small_run):
    assert {path.name for path in small_run.path.iterdir()} == {
        "config.gin", "config.json", "run.json", "activations", "checkpoints", "metrics.jsonl",
        "tensorboard", "evaluation.json", "report.html", "figures",
    }  # fmt: skip
    assert not [p for p in small_run.path.rglob("*") if p.name.endswith((".partial", "__lock"))]
    assert {p.name for p in (small_run.path / "figures").iterdir()} == {
        "curves.png", "density.png", "overview.png",
    }  # fmt: skip
    for figure in (small_run.path / "figures").iterdir():
        assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 5000


def test_the_configuration_is_whole_and_builds_the_same_run(small_run):
    built, text, as_json = config.load_experiment([str(small_run.path / "config.gin")])
    assert text == (small_run.path / "config.gin").read_text()
    assert as_json == read(small_run.path / "config.json")
    assert (built.sae.n_latents, built.sae.k, built.train.steps) == (256, 8, 120)
    assert built.optimizer.epsilon == 6.25e-10 and "Optimizer.epsilon = 6.25e-10" in text


def test_versions_and_command_line(small_run):
    content = read(small_run.path / "run.json")
    assert content["versions"]["saejax"] == saejax.__version__
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy"):
        assert re.match(r"\d+\.\d+", content["versions"][name]), name
    (start,) = content["starts"]
    assert start["argv"][1:] == small_run.flags
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", start["time"])


def test_one_progress_line_a_record(small_run):
    lines = [line for line in small_run.stderr.splitlines() if line.startswith("step ")]
    pattern = (
        r"step \d+/120  NMSE \d\.\d{4}  L0 \d+\.\d  dead \d+\.\d\d %  [\d,]+ tokens/s  "
        r"ETA (\d+h\d\dm|\d+m\d\ds|\d+s)"
    )
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert [line.split()[1] for line in lines] == ["40/120", "80/120", "120/120"]
    records = [json.loads(s) for s in (small_run.path / "metrics.jsonl").read_text().splitlines()]
    for line, record in zip(lines, records, strict=True):
        assert f"NMSE {record['nmse']:.4f}  L0 {record['l0']:.1f}" in line
    assert "warning" not in small_run.stderr.lower()


def test_metrics_and_events_say_the_same(small_run):
    records = [json.loads(s) for s in (small_run.path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [40, 80, 120]
    assert [r["tokens"] for r in records] == [40 * 256, 80 * 256, 120 * 256]
    assert all(set(r) >= RECORD and all(map(math.isfinite, r.values())) for r in records)
    events = scalars(small_run.path / "tensorboard")
    for name in set(records[0]) - {"step", "tokens"}:
        logged = np.float32([r[name] for r in records])
        assert events[f"train/{name}"] == [(int(r["step"]), v) for r, v in zip(records, logged)]
    assert records[-1]["nmse"] < records[0]["nmse"] < 1.2


def scalars(folder: pathlib.Path) -> dict[str, list[tuple[int, np.float32]]]:
    """Scalars of the event files, read by the formats' definitions: TFRecord, then protobuf."""
    found: dict[str, list] = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event, data = data[12 : 12 + length], data[16 + length :]
            # Event: 1 wall_time (double), 2 step (varint), 5 summary > 1 value > 1 tag, 2 float.
            match = re.search(
                rb"^\x09.{8}\x10(.+?)\x2a.\x0a.\x0a.(train/\w+)\x15(.{4})$", event, re.S
            )
            if match:
                step = sum((byte & 127) << 7 * i for i, byte in enumerate(match[1]))
                value = np.frombuffer(match[3], "<f4")[0]
                found.setdefault(match[2].decode(), []).append((step, value))
    return found


def test_evaluation_has_the_promised_figures(small_run):
    result = read(small_run.path / "evaluation.json")
    assert set(result) >= PROMISED
    wrong = [(name, value) for name, value in figures(result) if not math.isfinite(value)]
    assert wrong == []
    assert result["tokens"] == 8064 and result["l0"] == 8.0  # 128 contexts of 63 tokens, k
    assert 0 < result["nmse"] < result["baselines"]["untrained_nmse"]
    assert 0 < result["explained_variance"] < 1 and 0 <= result["dead_fraction"] < 1
    # 120 steps do not make a good dictionary, but one that is better than none.
    assert 0 < result["delta_ce"] < result["delta_ce_mean_ablation"]
    assert result["delta_ce"] < result["delta_ce_zero_ablation"] and result["kl"] > 0
    assert result["downstream_tokens"] == 32 * 62
    table = small_run.stderr
    for name in ("nmse", "delta_ce", "kl"):
        assert f"{result[name]:.4f}" in table
    assert re.search(rf"PCA, 8 components +{result['baselines']['pca_nmse']:.4f}\n", table)


def test_evaluation_does_not_depend_on_its_batches(small_run):
    experiment, _, _ = config.load_experiment([str(small_run.path / "config.gin")])
    source = open_source(
        experiment.data,
        experiment.sae,
        experiment.loader,
        experiment.train.batch_size,
        small_run.path / "activations",
        make_mesh(MeshShape()),
    )
    sae = saejax.load(small_run.path)
    odd = dataclasses.replace(
        experiment.evaluation, batch_size=333, batch_contexts=5, untrained=False
    )
    again, _ = evaluate(
        sae, source.held_out, odd, train_rows=source.train_rows, inputs=source.inputs()
    )
    recorded = dict(figures(read(small_run.path / "evaluation.json")))
    for name, value in figures(again):
        if isinstance(value, int):
            assert value == recorded[name], name
        else:
            assert value == pytest.approx(recorded[name], rel=1e-5, abs=1e-6), name
    assert set(recorded) - {name for name, _ in figures(again)} == {
        ".baselines.untrained_nmse", ".dead_fraction_train",
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a page refers to, and the text of its styles and scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.references, self.code, self.ids, self._inside = [], "", set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.references.append(value)
            if name == "style":
                self.code += value

    def handle_data(self, data):
        if self._inside in ("style", "script"):
            self.code += data


def test_the_report_needs_nothing_but_itself(small_run):
    text = (small_run.path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    inner = [r for r in page.references if r.startswith("#")]
    assert inner and {r[1:] for r in inner} <= page.ids
    assert [r for r in page.references if not r.startswith(("#", "data:"))] == []
    assert not re.search(r"https?:|@import|url\((?!['\"]?(data:|#))|fetch\(|import\(", page.code)
    assert text.count("<article") == 6 and text.rstrip().endswith("</html>")
    result = read(small_run.path / "evaluation.json")
    assert f"{result['nmse']:.3f}" in text and "8,064" in text


def digests(folder: pathlib.Path, *names: str) -> dict[str, str]:
    files = [p for name in names for p in [folder / name, *(folder / name).rglob("*")]]
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if p.is_file()
    }


RESULTS = (
    "config.gin", "config.json", "activations", "checkpoints", "metrics.jsonl", "evaluation.json",
    "report.html", "figures",
)  # fmt: skip


@pytest.fixture
def copy(small_run, tmp_path, monkeypatch):
    """A copy of the run in a scratch directory, and the command that made it, in this process."""
    shutil.copytree(small_run.home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")

    def command(*bindings: str) -> int:
        """Bindings, and flags, which begin with a dash."""
        flags.FLAGS.unparse_flags()
        more = [b if b.startswith("-") else f"--gin_bindings={b}" for b in bindings]
        try:
            return main.main(flags.FLAGS(["saejax", *small_run.flags, *more]))
        finally:
            for name in ("gin_file", "gin_bindings", "verify", "allow_config_change"):
                flags.FLAGS[name].unparse()

    return tmp_path / "home/runs/quickstart", command


def test_the_same_command_again_changes_no_result(copy):
    folder, command = copy
    before = digests(folder, *RESULTS)
    assert len(before) > 30
    assert command() == 0
    assert digests(folder, *RESULTS) == before
    assert len(read(folder / "run.json")["starts"]) == 2


def test_its_store_serves_another_run(copy, tmp_path):
    """The same activations, opened as a store instead of harvested, give the same figures."""
    folder, _ = copy
    unharvested = re.sub(r"(?m)^(Harvest|Text)\..*\n", "", (folder / "config.gin").read_text())
    unharvested = unharvested.replace("@Harvest()", "@Stored()")
    stored = f"Stored.path = '{folder}/activations'\nStored.subject = 'embedded'\n"
    (tmp_path / "stored.gin").write_text(unharvested + stored)
    built, text, as_json = config.load_experiment([str(tmp_path / "stored.gin")])
    built.run(tmp_path / "run", operative_gin=text, config_json=as_json, argv=[])
    assert digests(tmp_path / "run", "evaluation.json") == digests(folder, "evaluation.json")
    assert not (tmp_path / "run/activations").exists()


def test_what_was_deleted_is_made_again_and_equal(copy):
    """Every stage starts from what the one before it left."""
    folder, command = copy
    before = digests(folder, *RESULTS)
    for name in ("evaluation.json", "report.html"):
        (folder / name).unlink()
    shutil.rmtree(folder / "figures")
    shutil.rmtree(folder / "checkpoints/120")
    (folder / "activations/train/commits/000003.json").unlink()
    assert command() == 0
    after = digests(folder, *RESULTS)
    kept = {name for name in before if not name.startswith("checkpoints/120/")}
    changed = {name for name in kept if after.get(name) != before[name]}
    # Times are others, and the curves show them.
    assert changed <= {
        "metrics.jsonl", "report.html", "figures/curves.png", "figures/overview.png",
    }  # fmt: skip


def test_verify_finds_what_is_damaged_and_training_survives_it(copy, capsys):
    folder, command = copy
    before = digests(folder, *RESULTS)
    assert command("--verify") == 0
    table = capsys.readouterr().out
    for what in ("checkpoint 120: ", "params.w_dec", "activations/train ", "activations/held_out "):
        assert what in table
    assert digests(folder, *RESULTS) == before, "it changes nothing"
    payload = max((folder / "checkpoints/120").rglob("*"), key=lambda p: p.stat().st_size)
    store = max((folder / "activations/train").rglob("*"), key=lambda p: p.stat().st_size)
    for file in (payload, store):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert command("--verify") == 1
    table = capsys.readouterr().out
    assert f"{payload} has CRC-32" in table and "2 damaged" in table
    (line,) = [line for line in table.splitlines() if line.startswith("activations/train ")]
    assert "sound" not in line
    data[len(data) // 2] ^= 1
    store.write_bytes(data)
    assert command() == 0
    assert (folder / "checkpoints/120.damaged-1").is_dir()
    after = digests(folder, "checkpoints/120/metadata.json", "evaluation.json")
    assert after["evaluation.json"] == before["evaluation.json"]


def test_another_configuration_is_refused(copy, capsys):
    folder, command = copy
    before = digests(folder, *RESULTS, "run.json", "tensorboard")
    assert command("SAE.k = 16", "Harvest.seed = 1") == 1
    message = capsys.readouterr().err
    assert "holds a run of another configuration" in message
    assert "sae.k: 8 -> 16" in message and "data.seed: 0 -> 1" in message
    assert digests(folder, *RESULTS, "run.json", "tensorboard") == before


@pytest.mark.slow
def test_another_configuration_goes_on_where_it_is_allowed(copy, capsys, caplog):
    folder, command = copy
    change = ("Train.tokens = 33_280", "Train.log_every = 20", "Report.latents = 5")
    assert command("SAE.n_latents = 512", "--allow_config_change") == 1
    message = capsys.readouterr().err
    assert "checkpoints/120 does not fit: params.latent_bias is float32[256]" in message
    assert "changed in this run" in caplog.text and "sae.n_latents: 256 -> 512" in caplog.text
    assert command() == 0, "what did not fit is not this run's configuration"
    assert command(*change, "--allow_config_change") == 0
    assert "train.tokens: 30720 -> 33280" in caplog.text
    starts = read(folder / "run.json")["starts"]
    assert any("train.tokens: 30720 -> 33280" in s for s in starts[-1]["changed"])
    records = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [40, 80, 120, 130]
    assert command(*change) == 0, "the change is the run's own now"
