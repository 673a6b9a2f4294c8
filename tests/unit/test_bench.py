"""The benchmarks: what is timed takes turns, figures fit each other, errors name the flag."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.bench import __main__ as command
from pallas_kernels.bench import dense, inputs, ops, race, report, settings, steps, timing, trainers
from pallas_kernels.shapes import NAMED, Shape

TINY = Shape(d=16, n=96, k=4, tokens=32, k_aux=8)
TINY_NAME = "16x96x4x32"


# --- Timing ---------------------------------------------------------------------------------------


def test_things_take_turns():
    log = []
    runs = {
        name: timing.Run(
            lambda i, name=name: log.append((name, i)), lambda i, name=name: log.append("before")
        )
        for name in "abc"
    }
    measured = timing.alternate(runs, 4)
    assert {name: len(samples.wall) for name, samples in measured.items()} == dict.fromkeys(
        "abc", 4
    )
    called = [entry for entry in log if entry != "before"]
    assert log[0::2] == ["before"] * len(called)
    turns = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(turns) == 4 + timing.WARM_UP
    for number, turn in enumerate(turns):
        assert sorted(turn) == [(name, number) for name in "abc"]
    assert len({turn[0][0] for turn in turns}) == 3, "each goes first at times"


def test_timing_waits_and_measures():
    measured = timing.alternate(
        {
            "long": timing.Run(lambda i: sum(range(300_000))),
            "short": timing.Run(lambda i: sum(range(3_000))),
        },
        9,
    )
    long, short = measured["long"], measured["short"]
    assert timing.ratio(long.cpu, short.cpu) > 10
    assert timing.median(long.wall) >= 0.5 * timing.median(long.cpu) > 0
    extra = long.minus(short)
    np.testing.assert_array_equal(extra.wall, long.wall - short.wall)


def test_figures_of_samples():
    assert timing.median(np.array([3.0, 1.0, 2.0])) == 2
    assert timing.spread(np.arange(5.0)) == 2
    # Within repetitions: a machine that was busy in one of them changes nothing.
    assert timing.ratio(np.array([2.0, 20.0, 2.0]), np.array([1.0, 10.0, 1.0])) == 2


# --- Inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, Shape(d=8, n=4, k=4, tokens=16, k_aux=4)])
def test_latents_of_a_token_differ_and_are_unequally_popular(shape):
    made = inputs.make(shape, "float32", 0)
    indices_BK = np.asarray(made.indices_BK)
    assert indices_BK.min() >= 0 and indices_BK.max() < shape.n
    assert all(len(set(row)) == shape.k for row in indices_BK.tolist())
    assert (np.diff(made.values_BK, axis=1) <= 0).all()
    assert made.x_BD.shape == (shape.tokens, shape.d)


def test_popularity_has_a_heavy_tail():
    n, k = 16_384, 32
    every = inputs.probabilities(n, k, 0)
    assert every.sum() == pytest.approx(k)
    assert (every == 0).sum() == int(inputs.DEAD_SHARE * n)
    largest = np.sort(every)[::-1]
    assert largest[0] == pytest.approx(0.3)
    assert largest[: n // 100].sum() > k / 3, "a third of all activity is of few latents"


def test_inputs_fill_more_than_the_caches():
    shape = NAMED["cpu"]
    count = inputs.rotation(shape, jnp.float32, 2**28)
    assert 2 <= count <= 16
    assert count * 4 * (2 * shape.tokens + shape.n) * shape.d >= 2**28


# --- Operations and steps -------------------------------------------------------------------------


def test_every_public_operation_has_a_case():
    helpers = "block_tokens code_layout dense_below explain in_two_stages interpreting preferring"
    public = {name for name in pk.__all__ if name.islower()}
    public -= {*helpers.split(), "target", "pair_list"}
    public |= {f"pair_list.{name}" for name in pk.pair_list.__all__ if name.islower()}
    assert set(ops.CASES) == public


@pytest.mark.parametrize("op", ops.CASES)
def test_every_operation_has_a_case_that_runs(op):
    pool = [inputs.make(TINY, "float32", seed) for seed in range(2)]
    case = ops.CASES[op](TINY, pool)
    run = case.run("xla")
    for i in range(3):  # arguments that are donated are replaced
        out = run.call(i)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    assert case.moved > 0
    assert case.reason_against("xla") is None
    assert "gpu" in case.reason_against("mosaic_gpu") or "jax" in case.reason_against("mosaic_gpu")
    assert np.isfinite(pool[0].w_LD).all(), "the inputs are still there"


def test_encoders_are_the_product(monkeypatch):
    pool = [inputs.make(TINY, "float32", 0)]
    want = np.asarray(pool[0].x_BD) @ np.asarray(pool[0].w_LD).T
    for limit in (2**30, 4 * TINY.n * 8):  # whole, and eight tokens at a time
        monkeypatch.setattr(ops, "_BLOCK_LIMIT", limit)
        runs = ops.encoders(pool)
        block = min(TINY.tokens, limit // (4 * TINY.n))
        np.testing.assert_allclose(runs["encoder"].call(0), want[-block:], atol=1e-5)
        np.testing.assert_allclose(runs["encoder in place"].call(0)[0], want[-block:], atol=1e-5)


def test_a_copy_moves_every_byte_twice():
    run, moved = ops.copy(4096)
    assert moved == 8192
    first = np.asarray(run.call(0)[0])
    assert (np.asarray(run.call(1)[0]) == -first).all()


def test_the_dense_step_is_the_librarys_step():
    """Else the ratio of their times would mean nothing."""
    from saejax import mesh as mesh_lib
    from saejax.model.normalizer import Normalizer
    from saejax.model.sae import SAEConfig
    from saejax.train import state as state_lib
    from saejax.train.loss import LossConfig
    from saejax.train.optim import OptimizerConfig

    pool = [inputs.make(TINY, "float32", 0)]
    params = steps.planted(pool[0])
    sae = SAEConfig(d_model=TINY.d, n_latents=TINY.n, k=TINY.k)
    loss = LossConfig(k_aux=TINY.k_aux, dead_tokens=steps.DEAD_TOKENS)
    optimizer = OptimizerConfig(learning_rate=steps.RATE)
    program = steps.program(sae, loss, optimizer, Normalizer(), steps.STEPS, pool[0].x_BD)
    since_L = steps.since_fired(pool[0], True)
    assert (since_L > 0).sum() == int(inputs.DEAD_SHARE * TINY.n)
    # Low enough not to fire, high enough for AuxK to use them.
    params["latent_bias"] = jnp.where(since_L > 0, -0.3, 0.0)
    state = jax.device_put(
        state_lib.build_state(params, sae, optimizer, steps.STEPS, jnp.ones(())),
        program.state_shardings,
    )
    state = steps.with_counters(state, since_L, program)
    x_BD = jax.device_put(pool[0].x_BD, mesh_lib.token_sharding(program.mesh))
    whole = jax.device_get(params)
    state, metrics = program.step(state, x_BD)
    assert metrics.dead > 0 and metrics.auxk > 0

    params = jax.device_put(whole)
    zeros = jax.tree.map(jnp.zeros_like, params)
    train = jax.jit(dense.train_step, static_argnums=(0, 1))
    whole = (params, zeros, zeros, zeros)
    (new, mu, _, ema), _, since_new_L = train(
        TINY, jnp.dtype("float32"), whole, jnp.int32(1), jnp.asarray(since_L), pool[0].x_BD
    )
    moments = next(part for part in state.opt_state if hasattr(part, "mu"))
    dead_L = np.asarray(since_new_L) >= steps.DEAD_TOKENS
    assert np.abs(mu["w_enc"][dead_L]).max() > 0, "AuxK has a gradient"
    for name in new:
        np.testing.assert_allclose(moments.mu[name], mu[name], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(state.ema[name], ema[name], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(state.tokens_since_fired, since_new_L)


# --- The command ----------------------------------------------------------------------------------


def test_the_list_names_everything(capsys):
    assert command.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*NAMED, *settings.OPS, *settings.IMPLEMENTATIONS))


def test_table_and_json_agree(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pallas_kernels.bench.measure._COPY_BYTES", 2**20)
    file = tmp_path / "bench.json"
    chosen = ["--ops=top_k,decode_loss,step", f"--shapes={TINY_NAME}", "--repeats=3"]
    assert command.main([*chosen, f"--json={file}", "--no-keep_memory"]) == 0
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["jax"] == jax.__version__ and content["platform"] == "cpu"
    assert content["keep_memory"] is False and "given back" in out
    assert content["device"] and content["device"] in out and jax.__version__ in out
    rows = {(row["op"], row["implementation"]): row for row in content["rows"]}
    some = f"step, {inputs.DEAD_SHARE:.0%} dead"
    assert {
        ("encoder", "XLA"),
        ("top_k", "xla"),
        ("top_k", "lax.top_k"),
        ("decode_loss", "xla"),
        ("step", "picked"),
        (some, "picked"),
        ("auxk", "picked"),
        ("dense step", "autodiff"),
    } <= set(rows)
    assert rows["top_k", "lax.top_k"]["ratios"]["lax.top_k"] == 1
    for (op, by), row in rows.items():
        assert f"{op} " in out and f" {by} " in out
        assert row["shape"] == TINY_NAME and len(row["wall_ms"]) == 3
        assert row["median_ms"] == pytest.approx(sorted(row["wall_ms"])[1], rel=1e-4)
    step, plain = rows["step", "picked"], rows["dense step", "autodiff"]
    each = np.array(step["wall_ms"]) / np.array(plain["wall_ms"])
    assert step["ratios"]["dense step"] == pytest.approx(np.median(each), rel=1e-3)
    assert step["tokens_per_second"] == pytest.approx(1e3 * TINY.tokens / step["median_ms"])
    assert plain["memory"]["peak"] > TINY.tokens * TINY.n * 4
    extra = np.array(rows[some, "picked"]["wall_ms"]) - step["wall_ms"]
    np.testing.assert_allclose(rows["auxk", "picked"]["wall_ms"], extra, atol=1e-5)
    decode = rows["decode_loss", "xla"]
    assert 0 < decode["copy_share"] and set(decode["ratios"]) == {"encoder", "encoder in place"}


def test_a_named_implementation_that_cannot_run_says_why(capsys, monkeypatch):
    monkeypatch.setattr("pallas_kernels.bench.measure._COPY_BYTES", 2**20)
    chosen = [f"--shapes={TINY_NAME}", "--ops=decode_loss", "--repeats=1"]
    assert command.main([*chosen, "--implementations=reference,mosaic_tpu"]) == 0
    out = capsys.readouterr().out
    assert "reference" in out
    assert "not measured: decode_loss: implementation = 'mosaic_tpu' cannot run" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--shapes=cpuu"], ["--shapes", "'cpuu'", "Did you mean 'cpu'", "quickstart"]),
        (["--shapes=16x8x9x4"], ["--shapes", "16x8x9x4", "k <= n"]),
        (["--ops=topk"], ["--ops", "'topk'", "top_k", "row_update"]),
        (["--implementations=cuda"], ["--implementations", "'cuda'", "mosaic_gpu"]),
        (["--repeats=0"], ["--repeats=0", "at least 1"]),
        (["--dtype=float16"], ["--dtype", "'float16'", "bfloat16"]),
        (["--against=tensorflow"], ["--against", "'tensorflow'", "torch"]),
        (["--race_tokens=-1"], ["--race_tokens=-1", "at least 0"]),
        (["--race_rates=fast"], ["--race_rates", "'fast'", "positive number"]),
        (["--shapes=cpu", "--microbatch_size=3"], ["--microbatch_size=3", "divisor", "2048"]),
        (["--json=nowhere/b.json"], ["--json=nowhere/b.json", "does not exist"]),
        (["--json=."], ["--json=.", "is a folder"]),
        (["--ops= ,"], ["--ops=' ,'", "names none", "top_k"]),
        (["--shapes=100000x30000x2x8"], ["--shapes", "'100000x30000x2x8'", "2**31"]),
        (
            ["--shapes=cpu", "--against=torch", "--race_tokens=100"],
            ["--race_tokens=100", "2048"],
        ),
    ],
)
def test_errors_name_the_flag_the_value_and_what_is_allowed(arguments, parts, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(part in message for part in parts), message


def test_a_race_without_the_packages_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(trainers.PACKAGES, "sae-lens", "no_such_trainer")
    assert command.main([f"--shapes={TINY_NAME}", "--against=torch", "--race_tokens=0"]) == 2
    message = capsys.readouterr().err
    assert "sae-lens" in message and "pip install '.[bench]'" in message


def test_some_trainers_can_be_raced_by_name():
    chosen = settings.parse(["--against=sae-lens,eai-sparsify"])
    assert chosen.against == ("sae-lens", "eai-sparsify")
    names = [trainer.name for trainer in trainers.everyone(chosen.against)]
    assert names == ["saejax", "eai-sparsify", "sae-lens"]
    assert settings.parse(["--against=torch"]).against == settings.PEERS


# --- The race -------------------------------------------------------------------------------------


class Mean:
    """A trainer that learns the mean alone: its normalised error is 1."""

    name, recipe = "mean", "none"

    def __init__(self, terms):
        self.seen, self.marked, self.n = [], [], terms.shape.n

    def place(self, x_BD):
        return x_BD.copy()

    def update(self, x):
        self.seen.append(x)

    def mark_dead(self, dead_L):
        self.marked.append(int(dead_L.sum()))

    def dead(self):
        return self.n // 2

    def reconstruct(self, x_BD):
        return np.broadcast_to(np.concatenate(self.seen).mean(0), x_BD.shape)


def test_a_race_gives_everyone_the_same_tokens(tmp_path, capsys, monkeypatch):
    made = []

    def mean(terms):
        made.append(Mean(terms))
        return made[-1]

    mean.name = "mean"
    monkeypatch.setattr(trainers, "everyone", lambda names: (trainers.Saejax, mean))
    monkeypatch.setattr(trainers, "missing", lambda names: None)
    monkeypatch.setattr(race, "_HELD_OUT", 512)
    monkeypatch.setattr(race, "_SAMPLE", 512)
    monkeypatch.setattr(race, "_PAUSE", 0)
    file = tmp_path / "race.json"
    chosen = [f"--shapes={TINY_NAME}", "--ops=", "--against=torch", "--repeats=2"]
    assert command.main([*chosen, "--race_tokens=3200", f"--json={file}"]) == 0
    content = json.loads(file.read_text())
    (result,) = content["races"]
    ours, theirs = result["trainers"]
    assert (ours["name"], theirs["name"]) == ("saejax", "mean")
    assert result["tokens"] == 3200 and result["held_out_tokens"] == 512
    timed, raced = made
    assert len(raced.seen) == 3200 // TINY.tokens
    assert len({x.tobytes() for x in raced.seen}) == len(raced.seen), "no batch comes twice"
    assert set(timed.marked) == {0, max(timed.marked)} and max(timed.marked) > 0
    assert theirs["nmse"] == pytest.approx(1, abs=0.05) and theirs["dead_share"] == 0.5
    assert 0 < ours["nmse"] < 0.6
    rows = [row for row in content["rows"] if row["implementation"] == "mean"]
    assert [row["op"] for row in rows] == [f"step, {inputs.DEAD_SHARE:.0%} dead", "step"]
    assert all(row["ratios"]["saejax"] > 0 for row in rows)
    assert "NMSE" in capsys.readouterr().out


def test_the_race_uses_real_activations_where_they_fit(tmp_path, monkeypatch):
    from saejax.subjects import hf

    assert {hf.load_subject("embedded").width(site) for site in race._SITES} == {192, 768}
    source, described = race._source(TINY, 1000, str(tmp_path))
    assert "synthetic" in described and source.batches.sample_rows(8).shape == (8, TINY.d)


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.skipif(trainers.missing() is not None, reason=str(trainers.missing()))
@pytest.mark.parametrize("make", trainers.everyone()[1:], ids=lambda make: make.name)
def test_the_torch_trainers_train(make):
    rows = np.random.default_rng(0).standard_normal((64, TINY.d)).astype(np.float32)
    trainer = make(trainers.Terms(TINY, 400, 10_000, rows))
    before = race.normalized_error(trainer, rows, TINY.tokens)
    for i in range(200):
        trainer.update(trainer.place(rows[i % 2 * 32 :][:32]))
    assert race.normalized_error(trainer, rows, TINY.tokens) < min(before, 0.9)
    dead_L = np.arange(TINY.n) < 40
    trainer.mark_dead(dead_L)
    assert trainer.dead() == 40
    trainer.update(trainer.place(rows[:32]))
    assert 0 < trainer.dead() <= 40


def test_report_formats_numbers_of_every_size():
    samples = timing.Samples(np.array([0.1, 0.2]), np.array([0.1, 0.2]))
    row = report.Row(
        shape="s", op="o", implementation="i", samples=samples, ratios={"dense step": 0.25}
    )
    text = report.table([row])
    assert "dense/" in text and " 4" in text
    assert json.loads(json.dumps(row.as_json()))["median_ms"] == pytest.approx(150)
