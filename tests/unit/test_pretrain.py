"""The making of the embedded subject: material without leaks, baselines, a short training."""

import json
import math

import jax
import numpy as np
import pytest

from saejax.data.corpus import Document
from saejax.subjects import hf, material, model_card, ngram, pretrain

LINES = [f"a distinctive line of code number {i}" for i in range(40)]


def document(name, lines):
    return Document(name, "\n".join(lines))


@pytest.mark.parametrize(
    "candidate, reason",
    [
        (document("json/tool.py", LINES[20:]), "path of a held-out file"),
        (document("vendored/json/tool.py", LINES[20:]), "path of a held-out file"),
        (document("x.py", LINES[:20]), "exact duplicate"),
        (document("y.py", [*LINES[20:30], *LINES[:3]]), "shares lines"),
        (
            document("z.py", [*LINES[20:], *[line + " more" for line in LINES], *LINES[:5]]),
            "shares",
        ),
        (document("ok.py", [*LINES[20:], *LINES[:4]]), ""),
        (document("other_json/tools.py", LINES[20:]), ""),
        (document("short.py", ["return None", "pass"] * 9), ""),
    ],
    ids=lambda value: value.name if isinstance(value, Document) else "",
)
def test_nothing_like_a_held_out_file_is_admitted(candidate, reason):
    held = document("json/tool.py", [*LINES[:20], "return None"])
    gate = material._Gate([held, document("copy.py", LINES[:20])])
    assert gate._reason(candidate).startswith(reason)
    assert gate.admits(candidate) == (not reason)
    assert not gate.admits(Document("again.py", candidate.text)), "a second copy"


def test_real_material_keeps_the_held_out_files_apart():
    data = material.collect()
    held = {d.name for d in data.held_out}
    for d in [*data.library, *data.other]:
        assert not any(f"/{d.name}".endswith(f"/{name}") for name in held)
    texts = [d.text for d in [*data.library, *data.other, *data.held_out]]
    assert len(set(texts)) == len(texts)
    assert {"jax", "numpy", "optax"} <= {name for name, _, _ in data.packages}
    assert all(licence for _, _, licence in data.packages)


def reference_kneser_ney(train, n, vocab, history, word):
    """The textbook recursion, in plain Python."""

    def counts(order):
        grams = [tuple(train[i : i + n]) for i in range(len(train) - n + 1)]
        for shorter in range(n - 1, order - 1, -1):
            grams = [gram[1:] for gram in sorted(set(grams))] if shorter < n else grams
        table = {}
        for gram in grams:
            table[gram] = table.get(gram, 0) + 1
        return table

    p = 1 / vocab
    for order in range(1, n + 1):
        table = counts(order)
        once, twice = (sum(c == k for c in table.values()) for k in (1, 2))
        discount = once / (once + 2 * twice) if twice else 0.5
        context = tuple(history[len(history) - order + 1 :])
        follow = {g[-1]: c for g, c in table.items() if g[:-1] == context}
        if follow:
            total = sum(follow.values())
            seen = max(follow.get(word, 0) - discount, 0)
            p = (seen + discount * len(follow) * p) / total
    return p


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_kneser_ney_equals_the_textbook(n):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 6, size) ** 2 % 7 for size in (200, 30))
    model = ngram.fit(train, n, 7)
    p = ngram.probabilities(model, test)
    assert p.shape == (30 - n + 1,)
    for i, value in enumerate(p):
        at = i + n - 1
        expected = reference_kneser_ney(train.tolist(), n, 7, test[:at].tolist(), int(test[at]))
        assert value == pytest.approx(expected, rel=1e-12)


def test_kneser_ney_sums_to_one():
    train = np.random.default_rng(1).integers(0, 9, 500)
    model = ngram.fit(train, 3, 9)
    total = sum(ngram.probabilities(model, np.array([3, 4, word]))[0] for word in range(9))
    assert total == pytest.approx(1, rel=1e-12)
    with pytest.raises(ValueError, match="n = 6"):
        ngram.fit(train, 6, 9)


def test_batches_cover_each_epoch_and_never_cross_a_document():
    documents = [np.arange(50) + 1000 * i for i in range(3)] + [np.arange(4)]
    batches = pretrain.Batches(documents, 8, np.random.default_rng(0))
    rows = batches.take(14)
    assert rows.shape == (14, 9) and rows.dtype == np.int32
    assert (np.diff(rows, axis=1) == 1).all(), "consecutive tokens of one document"
    assert set(rows[:, 0] // 1000) == {0, 1, 2}
    assert batches.take(0).shape == (0, 9)
    again = pretrain.Batches(documents, 8, np.random.default_rng(0)).take(14)
    np.testing.assert_array_equal(rows, again)


def test_held_out_windows_hold_each_target_once():
    documents = [np.arange(30), np.arange(100, 109), np.arange(200, 208)]
    windows = pretrain.held_out_windows(documents, 8)
    targets = windows[:, 1:].ravel().tolist()
    assert targets == [*range(1, 25), *range(101, 109)]


def test_the_learning_rate_rises_stays_and_falls():
    cfg = pretrain.PretrainConfig(out="x", lr=1.0, warmup=0.1, decay=0.4)
    rates = [pretrain.learning_rate(cfg, share) for share in (0, 0.05, 0.3, 0.6, 0.8, 1, 1.1)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.5, 0, 0])


def test_a_few_seconds_of_training_write_a_subject_and_its_card(tmp_path, monkeypatch, capsys):
    words = "def return self value index for in range import class name none".split()
    rng = np.random.default_rng(0)

    def some(prefix, n):
        return [
            Document(
                f"{prefix}{i}.py", "\n".join(" ".join(rng.choice(words, 8)) for _ in range(60))
            )
            for i in range(n)
        ]

    data = material.Material(
        library=some("a", 4), other=some("b", 4), held_out=some("c", 2),
        packages=[("thing", "1.0", "MIT")], left_out={"exact duplicate": 2},
    )  # fmt: skip
    monkeypatch.setattr(material, "collect", lambda: data)
    shape = {"vocab_size": 300, "context": 16, "d_model": 16, "n_layers": 1, "n_heads": 2}
    pretrain.main(
        [f"--out={tmp_path}", "--minutes=0.05", "--batch=8"]
        + [f"--{name}={value}" for name, value in shape.items()]
    )
    record = json.loads((tmp_path / "pretrain.json").read_text())
    nats, baselines = record["held_out_nats_per_token"], record["baselines"]["all"]
    assert nats < baselines["1"] < math.log(300), "three seconds suffice to beat the unigrams"
    assert record["train"]["tokens_seen"] == record["train"]["steps"] * 8 * 16
    subject = hf.load_folder(tmp_path, "short")
    assert subject.config.d_model == 16
    held = pretrain.encode_all(data.held_out, subject.tokenizer)
    windows = pretrain.held_out_windows(held, 16)
    assert pretrain.measure(subject.params, subject.config, windows) == pytest.approx(nats)
    card = (tmp_path / "README.md").read_text()
    assert f"| {nats:.3f} | {record['held_out_bits_per_byte']:.3f} |" in card
    assert "`c0.py`, `c1.py`" in card and "| thing | 1.0 | MIT |" in card
    assert str(tmp_path) not in card
    assert "bits/byte" in capsys.readouterr().out


def test_the_card_reads_what_the_baselines_measured():
    documents = [np.array([0, *np.random.default_rng(i).integers(1, 9, 60)]) for i in range(4)]
    cfg = pretrain.GPT2Config(
        vocab_size=16, n_positions=8, d_model=8, n_layers=1, n_heads=1, d_mlp=8
    )
    got = model_card.baselines(documents[:2], documents[2:3], documents[3:], cfg)
    unigram = ngram.fit(np.concatenate(documents[:2]), 1, 16)
    expected = -np.log(ngram.probabilities(unigram, documents[3][1:57])).mean()
    assert got["library"]["1"] == pytest.approx(float(expected))
    assert got["all"]["2"] != got["library"]["2"]


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="--minutes = 0"):
        pretrain.PretrainConfig(out="x", minutes=0)
    with pytest.raises(ValueError, match="--out is empty"):
        pretrain.PretrainConfig(out="")
    assert jax.tree.leaves(pretrain.rounded({"a": np.float32([1.001])}))[0] == 1.0
