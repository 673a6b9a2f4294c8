"""Training fed straight from a subject: right rows, and bit-identical when killed and resumed."""

import dataclasses
import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import saejax
from saejax import mesh as mesh_lib
from saejax.checkpoint import Checkpoints
from saejax.data.corpus import TextConfig
from saejax.data.loader import Loader
from saejax.model.sae import SAEConfig
from saejax.sources import open_source, open_streams
from saejax.subjects.harvest import HarvestConfig, harvest, read_contexts
from saejax.subjects.hf import load_subject
from saejax.subjects.streaming import SiteBatches, StreamConfig, open_stream
from saejax.train.loop import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
SITE, OTHER = "1.resid_post", "0.mlp_hidden"
SAE = SAEConfig(d_model=192, n_latents=256, k=8)


@pytest.fixture(scope="module")
def subject():
    return load_subject("embedded")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        functions = (f"def f_{i}_{j}(x):\n    return x + {i * j}\n\n" for j in range(40))
        (folder / f"m{i}.py").write_text("".join(functions))
    harvest = HarvestConfig(
        site=SITE,
        context_length=32,
        batch_contexts=8,
        contexts_per_shard=32,
        held_out_tokens=1000,
        text=TextConfig(source=str(folder), held_out_percent=10.0),
    )
    return StreamConfig(harvest=harvest, lanes=4, buffer_batches=4)


def mesh_of(devices):
    return mesh_lib.make_mesh(mesh_lib.MeshShape(1, devices), jax.devices()[:devices])


def test_rows_are_the_subjects_activations_at_their_provenance(config, subject):
    stream, _ = open_stream(config, subject, [SITE, OTHER], 64, mesh_of(1))
    contexts = read_contexts(config.harvest, subject, "train")
    for batch in itertools.islice(stream.iterate(), 6):
        for site, (rows_BD, rows) in batch.items():
            where = np.asarray(rows.context).reshape(-1), np.asarray(rows.position).reshape(-1)
            picked = where[0][:5]
            acts = subject.capture_host(contexts.tokens[picked].astype(np.int32), [site])[site]
            expected = acts[np.arange(5), where[1][:5]]
            got = np.asarray(rows_BD[:5], np.float32)
            np.testing.assert_allclose(got, expected, rtol=2**-7, atol=1e-3 * abs(expected).max())
            assert (where[1] >= 1).all()


def test_store_and_stream_are_read_alike(config, subject, tmp_path):
    stream, _ = open_stream(config, subject, [SITE], 64, mesh_of(4))
    store, _ = harvest(config.held_out, tmp_path, subject=subject)[SITE]
    contexts = read_contexts(config.harvest, subject, "train")
    for source in (Loader(store, 64), SiteBatches(stream, SITE, 192)):
        whole, state, seen = list(itertools.islice(source.iterate(), 9)), 0, set()
        for batch in whole:
            rows_BD, where, state = source.next(state)
            np.testing.assert_array_equal(np.asarray(rows_BD), np.asarray(batch))
            np.testing.assert_array_equal(where.document, contexts.document[where.context])
            assert all(field.dtype == np.int64 and field.shape == (64,) for field in where)
            seen |= set(zip(where.context.tolist(), where.position.tolist(), strict=True))
        assert len(seen) == 9 * 64  # within an epoch no row comes twice
        acts = subject.capture_host(contexts.tokens[where.context[:5]].astype(np.int32), [SITE])
        expected = acts[SITE][np.arange(5), where.position[:5]]
        got, near = np.asarray(rows_BD[:5], np.float32), 1e-3 * abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=2**-7, atol=near)
        with pytest.raises(ValueError, match="-1: must be 0 or more"):
            source.next(-1)
        for step in (3, 7, 8):  # to any state, and on from there
            rows_BD, _, state = source.next(step)
            assert state == step + 1
            np.testing.assert_array_equal(np.asarray(rows_BD), np.asarray(whole[step]))


@pytest.mark.parametrize("devices, shards", [(4, 1), (4, 2)])
def test_any_number_of_devices_gives_the_same_rows(config, subject, devices, shards):

    several = dataclasses.replace(
        config, harvest=dataclasses.replace(config.harvest, subject_shards=shards)
    )
    one, _ = open_stream(config, subject, [SITE], 64, mesh_of(1))
    many, _ = open_stream(several, subject, [SITE], 64, mesh_of(devices))
    for a, b in itertools.islice(zip(one.iterate(3), many.iterate(3), strict=True), 4):
        a, b = a[SITE], b[SITE]
        np.testing.assert_array_equal(a[1].context, b[1].context)
        np.testing.assert_array_equal(a[1].position, b[1].position)
        # The order of float32 sums differs where a matrix is split: at most a bfloat16 apart.
        a, b = np.asarray(a[0], np.float32), np.asarray(b[0], np.float32)
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-4 * abs(a).max())


def test_sources_of_several_sites_share_one_pass(config, tmp_path):
    alias = "0.mlp_act"
    saes = {SITE: SAE, alias: SAEConfig(d_model=768, n_latents=64, k=4)}
    sources = open_streams(config, saes, 64, tmp_path, mesh_of(1))
    assert sources[SITE].batches.stream is sources[alias].batches.stream
    assert sources[alias].batches.sample_rows(10).shape == (10, 768)
    for site, source in sources.items():
        held_out = np.concatenate([b.reshape(-1, b.shape[-1]) for b in source.held_out()])
        assert held_out.shape[1] == saes[site].d_model and len(held_out) >= 900
        assert source.site == (OTHER if site == alias else site)
        assert source.inputs().mean.shape == (saes[site].d_model,)
    with pytest.raises(ValueError, match=r"'0\.mlp_hidden' and '0\.mlp_act' are the same site"):
        open_streams(config, {OTHER: saes[alias], **saes}, 64, tmp_path, mesh_of(1))


def test_bad_settings_are_refused(config, subject, tmp_path):

    def opened(sae=SAE, batch=64, **changes):
        return open_source(
            dataclasses.replace(config, **changes), sae, None, batch, tmp_path, mesh_of(4)
        )

    with pytest.raises(ValueError, match=r"SAE\.d_model = 191 does not fit site"):
        opened(SAEConfig(d_model=191, n_latents=256, k=8))
    with pytest.raises(ValueError, match=r"Stream\.lanes = 6 does not divide by the 4 devices"):
        opened(lanes=6, batch=66)
    with pytest.raises(ValueError, match=r"does not divide by Stream\.lanes = 4"):
        opened(batch=66)
    with pytest.raises(ValueError, match=r"'9\.resid_post'"):
        opened(harvest=dataclasses.replace(config.harvest, site="9.resid_post"))


def test_a_model_is_trained_from_a_stream(config):
    sae = saejax.train(
        config,
        sae=SAE,
        train=TrainConfig(tokens=64 * 60, batch_size=64, sample_rows=512, log_every=20),
        mesh=mesh_lib.MeshConfig(mesh_shape=(2, 2)),
    )
    assert sae.config.n_latents == 256


BINDINGS = {
    "Text.max_bytes": 150_000,
    "Harvest.held_out_tokens": 2000,
    "Harvest.contexts_per_shard": 32,
    "Stream.buffer_batches": 8,
    "Harvest.batch_contexts": 16,
    "SAE.n_latents": 256,
    "SAE.k": 8,
    "Train.tokens": 256 * 60,
    "Train.batch_size": 256,
    "Train.sample_rows": 1024,
    "Train.log_every": 5,
    "Optimizer.warmup_steps": 10,
    "Loss.dead_tokens": 2000,
    "Checkpoint.every_steps": 4,
    "Evaluation.downstream_tokens": 1024,
    "Evaluation.pca_tokens": 1024,
    "Experiment.report": None,
}


def start(workdir: pathlib.Path, bindings=BINDINGS) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "saejax.main", "--gin_file=gin/streamed.gin"),
            f"--workdir={workdir}",
            *(f"--gin_bindings={name} = {value!r}" for name, value in bindings.items()),
        ],
        cwd=ROOT,
        env=dict(os.environ),
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def digests(workdir: pathlib.Path):
    """Of the arrays of the last checkpoint."""
    store = Checkpoints(workdir / "checkpoints", alone=True)
    step = store.latest()
    return step, {name: array["digest"] for name, array in store.metadata(step)["arrays"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("trials", [12])
def test_killed_runs_end_bit_identical(tmp_path, trials):
    quiet = start(tmp_path / "quiet")
    _, said = quiet.communicate(timeout=600)
    assert quiet.returncode == 0, said
    chance, kills = random.Random(0), 0
    workdir = tmp_path / "killed"
    while True:
        running = start(workdir)
        if kills < trials:
            while not list((workdir / "checkpoints").glob("[0-9]*")) and running.poll() is None:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.6))
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                kills += 1
        _, said = running.communicate(timeout=600)
        if running.returncode == 0:
            break
        assert running.returncode == -signal.SIGKILL, said
    assert kills >= 1
    assert digests(workdir) == digests(tmp_path / "quiet")


SEVERAL = {
    **BINDINGS,
    "Several.report": None,
    "Train.tokens": 256 * 24,
    "small/SAE.n_latents": 64,
    "large/SAE.n_latents": 256,
    "mlp/SAE.n_latents": 128,
}


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_several_end_as_each_would_alone(tmp_path, stopped):
    """Two sizes at one site and one at another, from one pass; stopped once on the way, or not."""
    bindings = {k: v for k, v in SEVERAL.items() if k not in ("Experiment.report", "SAE.n_latents")}
    command = [
        *(sys.executable, "-m", "saejax.main", "--gin_file=gin/several.gin"),
        f"--workdir={tmp_path / 'all'}",
        *(f"--gin_bindings={name} = {value!r}" for name, value in bindings.items()),
    ]
    if stopped:
        running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not list(tmp_path.glob("all/mlp/checkpoints/[0-9]*")) and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=600)
        assert running.returncode in (0, 42), said
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, latents in (("small", 64), ("large", 256), ("mlp", 128)):
        assert saejax.load(tmp_path / "all" / name).config.n_latents == latents
        assert (tmp_path / "all" / name / "evaluation.json").exists()
    alone = {**BINDINGS, "Train.tokens": 256 * 24, "SAE.n_latents": 256}
    solo = start(tmp_path / "solo", alone)
    _, said = solo.communicate(timeout=600)
    assert solo.returncode == 0, said
    assert digests(tmp_path / "all/large") == digests(tmp_path / "solo")


STORED = {
    "Text.max_bytes": 300_000,
    "Harvest.tokens": 12_000,
    "Harvest.held_out_tokens": 2000,
    "Harvest.contexts_per_shard": 32,
    "SAE.n_latents": 256,
    "SAE.k": 8,
    "Train.tokens": 256 * 24,
    "Train.batch_size": 256,
    "Train.sample_rows": 1024,
    "Optimizer.warmup_steps": 10,
    "Evaluation.pca_tokens": 1024,
    "Evaluation.downstream_tokens": 512,
    "Experiment.report": None,
}


def command_of(workdir: pathlib.Path, processes: int, gin: str, bindings: dict) -> list[str]:
    """Starts the run in so many processes, with two devices in all."""
    return [
        *(sys.executable, "-m", "launch.local", f"--processes={processes}"),
        *(f"--devices_per_process={2 // processes}", "--", f"--gin_file={gin}"),
        f"--workdir={workdir}",
        *(f"--gin_bindings={name} = {value!r}" for name, value in bindings.items()),
    ]


def launched(*what) -> pathlib.Path:
    done = subprocess.run(command_of(*what), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return what[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gin", "bindings"),
    [
        ("gin/streamed.gin", BINDINGS | {"Train.tokens": 256 * 24}),
        ("gin/quickstart.gin", STORED),
    ],
)
def test_two_processes_train_what_one_does(tmp_path, gin, bindings):
    """Bit by bit, from a stream and from a store: each process makes or reads its own rows.

    So does a run that is stopped in two processes and goes on in one.
    """
    two, one = (launched(tmp_path / str(n), n, gin, bindings) for n in (2, 1))
    assert digests(two) == digests(one)
    moved = tmp_path / "moved"
    often = bindings | {"Checkpoint.every_steps": 3, "Checkpoint.keep": None}
    process = subprocess.Popen(command_of(moved, 2, gin, often), cwd=ROOT, stderr=subprocess.PIPE)
    while not list(moved.glob("checkpoints/[0-9]*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 42, said
    launched(moved, 1, gin, often)
    assert digests(moved) == digests(one)


@pytest.mark.slow
def test_two_processes_train_several_from_one_stream(tmp_path):
    several = {k: v for k, v in SEVERAL.items() if k not in ("Experiment.report", "SAE.n_latents")}
    all_of_them = launched(tmp_path / "all", 2, "gin/several.gin", several)
    solo = BINDINGS | {"Train.tokens": 256 * 24}
    alone = launched(tmp_path / "alone", 2, "gin/streamed.gin", solo)
    assert digests(all_of_them / "large") == digests(alone)
