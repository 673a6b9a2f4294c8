"""Bad input as a user meets it: one line with field, value, allowed and fix; exit code 1.

And nothing is overwritten: every folder that a faulty command names is compared before and after.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import saejax
from saejax import config, main
from saejax.data.shards import StoreSpec, open_store
from saejax.model.sae import SAEConfig
from saejax.rundir import RunDirectory
from saejax.train.loop import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
SYNTHETIC, HARVEST, STORED = "synthetic", "harvest", "stored"
SMALL = {
    SYNTHETIC: """
        Experiment.data = @Synthetic()
        Synthetic.features = 32
        Synthetic.d_model = 8
        SAE.d_model = 8
        Train.tokens = 512
        Train.batch_size = 64
        Train.log_every = 1
    """,
    HARVEST: """
        Experiment.data = @Harvest()
        Harvest.context_length = 16
        Harvest.contexts_per_shard = 16
        Harvest.batch_contexts = 16
        Harvest.text = @Text()
        SAE.d_model = 192
        Train.tokens = 512
        Train.batch_size = 64
    """,
    STORED: """
        Experiment.data = @Stored()
        SAE.d_model = 8
        Train.tokens = 64
        Train.batch_size = 16
    """,
}
COMMON = """
    SAE.n_latents = 32
    SAE.k = 2
    Train.sample_rows = 64
    Experiment.report = None
    Experiment.evaluation = None
"""
CLAIM = ["config.gin", "config.json", "run.json"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The gin files of tiny runs, by the kind of their data."""
    folder = tmp_path_factory.mktemp("gin")
    for kind, text in SMALL.items():
        content = f"include 'gin/base.gin'\n{textwrap.dedent(text)}{textwrap.dedent(COMMON)}"
        (folder / f"{kind}.gin").write_text(content)
    return {kind: f"{folder}/{kind}.gin" for kind in SMALL}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    """A finished synthetic run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main_in_process([f"--gin_file={small[SYNTHETIC]}", f"--workdir={folder}"]) == 0
    return folder


def main_in_process(given: list[str]) -> int:
    """`python -m saejax.main` without the start of a Python."""
    flags.FLAGS.unparse_flags()
    try:
        return main.main(flags.FLAGS(["saejax", *given]))
    finally:
        for name in ("gin_file", "gin_bindings", "workdir"):
            flags.FLAGS[name].unparse()


@pytest.fixture
def command(capsys, small):
    """Runs the command and gives its exit code and what it wrote to stderr."""

    def run(*bindings: str, workdir, base: str = SYNTHETIC) -> tuple[int, str]:
        given = [f"--gin_file={small.get(base, base)}", f"--workdir={workdir}"]
        capsys.readouterr()
        code = main_in_process([*given, *(f"--gin_bindings={binding}" for binding in bindings)])
        return code, capsys.readouterr().err

    return run


def assert_refused(outcome: tuple[int, str], *words: str) -> None:
    """Exit code 1 and exactly one line, ours, which has all the words."""
    code, stderr = outcome
    assert code == 1, stderr
    assert stderr.startswith("saejax: error: ") and stderr.count("\n") == 1, stderr
    assert [word for word in words if word not in stderr] == [], stderr
    assert "--debug" not in stderr, "a library's error, not a message of ours"


def digest(folder: pathlib.Path) -> dict[str, str]:
    """Every path under a folder with the hash of its bytes and its time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[path.relative_to(folder).as_posix()] = f"{content} {path.lstat().st_mtime_ns}"
    return found


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- The configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gin/syntetic.gin", ["'gin/syntetic.gin'", "Did you mean gin/synthetic.gin?"]),
        ("gin/nothing/like/it.gin", ["'gin/nothing/like/it.gin' does not exist; looked in"]),
    ],
)
def test_a_missing_gin_file(command, finished, name, words):
    before = digest(finished)
    assert_refused(command(base=name, workdir=finished), *words)
    assert digest(finished) == before


def test_a_gin_file_that_is_not_utf8(command, finished, tmp_path):
    before = digest(finished)
    (tmp_path / "latin.gin").write_bytes(b"# caf\xe9\nSAE.k = 4\n")
    outcome = command(base=str(tmp_path / "latin.gin"), workdir=finished)
    assert_refused(outcome, "latin.gin is not UTF-8 at byte 5")
    assert digest(finished) == before


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        ("SEA.k = 4", ["SEA.k = 4", "unknown configurable", "Did you mean SAE?"]),
        ("SAE.n_latent = 64", ["SAE has no field 'n_latent'", "Did you mean n_latents"]),
        ("SAE.k = 'four'", ["SAE.k = 'four'", "int"]),
        ("SAE.k = 33", ["k = 33", "n_latents = 32", "lower k or raise n_latents"]),
        ("Loss.k_aux = 33", ["Loss.k_aux = 33", "SAE.n_latents = 32", "lower it"]),
        (
            "Loss.multi_topk_coefficient = 0.1; SAE.k = 9",
            ["Loss.multi_topk_factor = 4", "SAE.k = 9", "SAE.n_latents = 32", "lower one"],
        ),
        ("Mesh.mesh_shape = (3, 1)", ["Train.batch_size = 64", "3 devices", "multiple is 66"]),
        (
            "Mesh.mesh_shape = (1, 5)",
            ["SAE.n_latents = 32", "mesh_shape = (1, 5)", "multiple is 35"],
        ),
        ("Train.microbatch_size = 48", ["Train.microbatch_size = 48", "= 64", "32 does"]),
        ("Train.tokens = 63", ["tokens = 63", "batch_size = 64", "lower batch_size"]),
        ("Train.tokens = 0", ["tokens = 0", "at least 1"]),
        ("Experiment.report = @Report()", ["report needs evaluation", "Experiment.evaluation"]),
    ],
)
def test_a_wrong_configuration_touches_nothing(command, finished, bindings, words):
    before = digest(finished)
    assert_refused(command(*bindings.split("; "), workdir=finished), *words)
    assert digest(finished) == before


# --- The machine ----------------------------------------------------------------------------------


def test_fewer_devices_than_the_mesh_are_found_before_the_harvest(command, tmp_path):
    outcome = command("Mesh.mesh_shape = (16, 1)", workdir=tmp_path / "run", base=HARVEST)
    assert_refused(outcome, "Mesh.mesh_shape = (16, 1)", "8 are present", "one of (1, 8)")
    assert names(tmp_path / "run") == CLAIM


# --- Activations ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty small documents."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = (f"def f_{i}_{j}(x):\n    return x + {i * j}\n" for j in range(12))
        (folder / f"m{i:02}.py").write_text("\n".join(lines))
    return folder


def test_another_width_than_the_sites(command, text, tmp_path):
    bindings = [f"Text.source = '{text}'", "SAE.d_model = 64"]
    outcome = command(*bindings, workdir=tmp_path / "run", base=HARVEST)
    assert_refused(outcome, "SAE.d_model = 64", "1.resid_post", "192 wide; set SAE.d_model = 192")
    assert names(tmp_path / "run") == CLAIM


def test_another_width_than_the_features(command, tmp_path):
    outcome = command("SAE.d_model = 16", workdir=tmp_path / "run")
    assert_refused(outcome, "SAE.d_model = 16", "Synthetic.d_model", "set SAE.d_model = 8")
    assert not (tmp_path / "run").exists()


def test_no_such_site(command, text, tmp_path):
    bindings = [f"Text.source = '{text}'", "Harvest.site = '1.resid_pots'"]
    outcome = command(*bindings, workdir=tmp_path / "run", base=HARVEST)
    assert_refused(outcome, "site = '1.resid_pots'", "nearest: 1.resid_post")
    assert names(tmp_path / "run") == CLAIM


def test_a_batch_that_chunks_cannot_give_is_found_before_the_harvest(command, text, tmp_path):
    bindings = [f"Text.source = '{text}'", "Train.batch_size = 24"]
    outcome = command(*bindings, workdir=tmp_path / "run", base=HARVEST)
    assert_refused(outcome, "batch_size = 24", "multiple of 16", "[1, 2, 4, 8]")
    assert names(tmp_path / "run") == CLAIM


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two tiny stores of width 8."""
    folder = tmp_path_factory.mktemp("stored")
    for split in ("train", "held_out"):
        make_store(folder / split, split, width=8)
    return folder


def make_store(path: pathlib.Path, split: str, width: int, site: str = "0.resid_post") -> None:
    spec = StoreSpec(
        subject="tiny",
        subject_fingerprint="aa",
        text_fingerprint=split,
        split=split,
        site=site,
        d_model=width,
        context_length=5,
        contexts_per_shard=16,
        n_shards=1,
    )
    store = open_store(path, spec, "w")
    ids = np.arange(16)
    rows = np.random.default_rng(0).normal(size=(16, 4, width)).astype(np.float32)
    store.write_shard(
        0, rows, tokens=np.zeros((16, 5), np.uint32), context=ids, document=ids, offset=ids
    )
    store.write_documents([f"d{i}" for i in range(16)])
    store.finish()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_store_of_another_width(command, stored, tmp_path, split):
    shutil.copytree(stored, tmp_path / "stores")
    shutil.rmtree(tmp_path / "stores" / split)
    make_store(tmp_path / "stores" / split, split, width=12)
    before = digest(tmp_path / "stores")
    bindings = f"Stored.path = '{tmp_path}/stores'"
    outcome = command(bindings, workdir=tmp_path / "run", base=STORED)
    assert_refused(outcome, "SAE.d_model = 8", f"stores/{split}", "12 wide; set SAE.d_model = 12")
    assert digest(tmp_path / "stores") == before and names(tmp_path / "run") == CLAIM


def test_two_splits_of_different_sites(command, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "stores")
    shutil.rmtree(tmp_path / "stores/held_out")
    make_store(tmp_path / "stores/held_out", "held_out", width=8, site="1.mlp_out")
    outcome = command(f"Stored.path = '{tmp_path}/stores'", workdir=tmp_path / "run", base=STORED)
    assert_refused(outcome, "site = '0.resid_post'", "'1.mlp_out'", "two splits of one harvest")


def test_no_store_or_an_unfinished_one(command, stored, tmp_path):
    outcome = command(f"Stored.path = '{tmp_path}/no'", workdir=tmp_path / "run", base=STORED)
    assert_refused(outcome, f"{tmp_path}/no/train/spec.json is missing: no store there")
    shutil.copytree(stored, tmp_path / "stores")
    (tmp_path / "stores/train/commits/000000.json").unlink()
    (tmp_path / "stores/train/manifest.json").unlink()
    before = digest(tmp_path / "stores")
    outcome = command(f"Stored.path = '{tmp_path}/stores'", workdir=tmp_path / "run", base=STORED)
    assert_refused(outcome, "stores/train: unfinished, 1 of 1 shards", "Run the harvest again")
    assert digest(tmp_path / "stores") == before


def test_a_store_cut_short_is_never_trained_on(command, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "stores")
    shard = tmp_path / "stores/train/acts/c/0/0"
    shard.write_bytes(shard.read_bytes()[:100])
    outcome = command(f"Stored.path = '{tmp_path}/stores'", workdir=tmp_path / "run", base=STORED)
    assert_refused(
        outcome, "stores/train/acts/c/0/0 (shard 0, chunk", "damaged", "Delete commits/000000.json"
    )
    assert names(tmp_path / "run") == CLAIM


SAE_8 = SAEConfig(d_model=8, n_latents=32, k=2)
TRAIN = TrainConfig(tokens=256, batch_size=64, sample_rows=64)


def rows(n: int = 256, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, width)).astype(np.float32)


def with_value(value: float, dtype=np.float32) -> np.ndarray:
    broken = rows().astype(dtype)
    broken[[7, 200], 3] = value
    return broken


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_value(np.nan), "2 of 256 activations hold NaN or infinity, the first at row 7; rem"),
        (with_value(np.inf), "2 of 256 activations hold NaN or infinity, the first at row 7"),
        (with_value(1e300, np.float64), "2 of 256 .* hold NaN or infinity, the first at row 7"),
        (jnp.asarray(with_value(-np.inf)), "2 of 256 activations hold NaN or infinity"),
        (jnp.asarray(with_value(np.nan), jnp.bfloat16), "2 of 256 activations hold NaN or inf"),
        (rows(width=12), "SAE.d_model = 8 does not fit .* 12 wide; set SAE.d_model = 12"),
        (rows(63), "63 activations are fewer than batch_size = 64; lower batch_size"),
        (rows().reshape(4, 64, 8), r"shape \(4, 64, 8\) must be a matrix \[N, D\]; reshape"),
        (rows().astype(np.int32), "dtype int32 must be floating-point; convert"),
        (
            np.ones((256, 8), np.float32),
            "64 activations has total variance 0.*must be above 0: give",
        ),
        (np.zeros((0, 8), np.float32), "0 activations are fewer than batch_size = 64"),
    ],
)
def test_activations_in_memory(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        saejax.train(data, sae=SAE_8, train=TRAIN, workdir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() or names(tmp_path / "run") == CLAIM


def test_a_loss_that_is_no_number_ends_in_one_line(small, tmp_path):
    given = [f"--gin_file={small[SYNTHETIC]}", "--gin_bindings=Optimizer.learning_rate = 1e38"]
    command = [sys.executable, "-m", "saejax.main", *given, f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *progress, message = done.stderr.splitlines(keepends=True)
    assert all(line.startswith(("step ", "steps 2 to 8 were")) for line in progress), done.stderr
    found = (done.returncode, message)
    says = ("a second time since the start", "lower Optimizer.learning_rate", "workdir")
    assert_refused(found, *says)
    assert not (tmp_path / "run/checkpoints").exists()
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1]


# --- Text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["Text.source = '", "holds no text", ".txt, .py, .md, .jsonl"]),
        ({"a.txt": b"", "b.md": b" \n\t\n"}, ["Text.source = '", "holds no text"]),
        ({"a.exe": b"text"}, ["Text.source = '", "holds no text"]),
        (
            {"a.txt": b"one", "b.txt": b"two"},
            [
                "Text.source = '",
                "train split",
                "context_length = 16",
                "give more text or a shorter",
            ],
        ),
        ({"a.txt": b"word " * 99}, ["leaves the held_out split empty", "at least two"]),
        ({"a.txt": b"caf\xe9 au lait"}, ["a.txt is not UTF-8", "0xe9 at byte offset 3", "iconv"]),
        ({"a.txt": "tone".encode("utf-16")}, ["a.txt is not UTF-8", "offset 0"]),
        ({"a.jsonl": b'{"text": "x"}\n{"txt": 1}\n'}, ["a.jsonl, line 2", 'string field "text"']),
        ({"a.jsonl": b"{nonsense\n"}, ["a.jsonl, line 1 is not JSON"]),
    ],
)
def test_text_without_text(command, tmp_path, files, words):
    (tmp_path / "text").mkdir()
    for name, content in files.items():
        (tmp_path / "text" / name).write_bytes(content)
    before = digest(tmp_path / "text")
    binding = f"Text.source = '{tmp_path}/text'"
    outcome = command(binding, workdir=tmp_path / "run", base=HARVEST)
    assert_refused(outcome, *words)
    assert digest(tmp_path / "text") == before and names(tmp_path / "run") == CLAIM


def test_no_such_text_and_then_the_right_path_in_the_same_workdir(command, text, tmp_path):
    binding = f"Text.source = '{tmp_path}/txet'"
    outcome = command(binding, workdir=tmp_path / "run", base=HARVEST)
    assert_refused(outcome, f"Text.source = '{tmp_path}/txet'", "no such file or folder")
    code, stderr = command(f"Text.source = '{text}'", workdir=tmp_path / "run", base=HARVEST)
    assert code == 0, stderr
    assert f"Text.source = '{text}'" in (tmp_path / "run/config.gin").read_text()
    assert len(json.loads((tmp_path / "run/run.json").read_text())["starts"]) == 2


# --- The run directory ----------------------------------------------------------------------------


def test_another_run_is_refused_and_untouched(command, finished):
    before = digest(finished)
    bindings = ("SAE.k = 3", "Optimizer.beta1 = 0.5", "Loss.dead_tokens = 7")
    outcome = command(*bindings, workdir=finished)
    changes = ("sae.k: 2 -> 3", "optimizer.beta1: 0.9 -> 0.5", "loss.dead_tokens: 10000000 -> 7")
    assert_refused(outcome, f"workdir = {finished} holds a run of another", *changes, "another --w")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        saejax.train(rows(), sae=SAE_8, train=TRAIN, workdir=finished)
    assert digest(finished) == before


def test_a_change_that_the_data_refuse_is_not_kept(finished, small, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    kept = (tmp_path / "run/config.json").read_bytes()
    given = [f"--gin_file={small[SYNTHETIC]}", f"--workdir={tmp_path}/run"]
    changes = [f"--gin_bindings={binding}" for binding in ("SAE.k = 3", "Synthetic.d_model = 16")]
    try:
        code = main_in_process([*given, *changes, "--allow_config_change"])
    finally:
        flags.FLAGS["allow_config_change"].unparse()
    assert_refused((code, capsys.readouterr().err), "SAE.d_model = 8", "Synthetic.d_model")
    assert (tmp_path / "run/config.json").read_bytes() == kept
    assert main_in_process(given) == 0


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"thesis.tex": "x"}, ["is not empty (thesis.tex)", "holds no run", "--workdir"]),
        ({"config.json": '{"model_type": "gpt2"}'}, ["model_type: 'gpt2' -> (absent)"]),
        ({"config.json": "[1, 2]", "a": ""}, ["config.json holds no JSON object", "--workdir"]),
        ({"config.json": '{"class": "Exp'}, ["config.json is damaged", "restore it"]),
        ({"checkpoints": "a file"}, ["is not empty (checkpoints)"]),
    ],
)
def test_a_folder_of_something_else(command, tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    before = digest(tmp_path)
    assert_refused(command(workdir=tmp_path), *words)
    assert digest(tmp_path) == before


@pytest.mark.parametrize("place", ["file", "file/under", "/proc/saejax/run", "/dev/null"])
def test_a_workdir_that_cannot_be(command, tmp_path, place):
    (tmp_path / "file").write_text("precious")
    before = digest(tmp_path)
    outcome = command(workdir=tmp_path / place)
    assert_refused(outcome, f"workdir = {tmp_path / place} cannot be written", "you may write to")
    assert digest(tmp_path) == before


@contextlib.contextmanager
def nobody(below: pathlib.Path):
    """Root may write everywhere: acts as another user, who may pass through the test's folders."""
    for folder in (below, *below.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["empty", "below/run"])
def test_a_read_only_workdir(command, tmp_path, monkeypatch, name):
    claim = RunDirectory.claim

    def claim_as_a_user(run, *args, **options):
        with nobody(tmp_path) if os.geteuid() == 0 else contextlib.nullcontext():
            claim(run, *args, **options)

    monkeypatch.setattr(RunDirectory, "claim", claim_as_a_user)
    for folder in ("empty", "below"):
        (tmp_path / folder).mkdir(mode=0o555)
    before = digest(tmp_path)
    outcome = command(workdir=tmp_path / name)
    assert_refused(outcome, f"workdir = {tmp_path / name} cannot be written (Permission denied)")
    assert digest(tmp_path) == before


# --- Checkpoints ----------------------------------------------------------------------------------


def transplanted(small, finished, folder: pathlib.Path, binding: str) -> pathlib.Path:
    """A run directory of `SMALL` with one more binding, and the checkpoints of the run without."""
    _, operative, as_json = config.load_experiment([small[SYNTHETIC]], [binding])
    RunDirectory(folder).claim(as_json, operative, [])
    for name in ("checkpoints", "tensorboard"):
        shutil.copytree(finished / name, folder / name)
    shutil.copy(finished / "metrics.jsonl", folder)
    return folder


def test_a_checkpoint_of_another_shape(command, small, finished, tmp_path):
    """The run directory says one model, its checkpoints are another's: nothing is cut to fit."""
    folder = transplanted(small, finished, tmp_path / "run", "SAE.n_latents = 64")
    before = digest(folder)
    outcome = command("SAE.n_latents = 64", workdir=folder)
    named = ("trained with another configuration (sae.n_latents: 32 -> 64)", "another --workdir")
    assert_refused(outcome, "checkpoint 8", *named)
    assert {name for name in before if digest(folder).get(name) != before[name]} == set(CLAIM)


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("Synthetic.seed = 5", "trained on other activations"),
        ("SAE.normalization = 'none'", "trained with normaliser"),
    ],
)
def test_a_checkpoint_of_other_data(command, small, finished, tmp_path, binding, words):
    folder = transplanted(small, finished, tmp_path / "run", binding)
    before = digest(folder)
    outcome = command(binding, workdir=folder)
    assert_refused(outcome, "checkpoint 8", words, "another --workdir")
    assert {name for name in before if digest(folder).get(name) != before[name]} == set(CLAIM)


@pytest.mark.parametrize("place", ["nowhere", "empty", "run/checkpoints/99"])
def test_nothing_to_load(finished, tmp_path, place):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").symlink_to(finished)
    with pytest.raises(FileNotFoundError, match="no checkpoint") as caught:
        saejax.load(tmp_path / place)
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "empty") == [] and not (tmp_path / "nowhere").exists()
