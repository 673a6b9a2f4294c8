"""The comparison of orders: each is an order of all rows, and what is printed is what was found."""

import numpy as np
import pytest

from saejax import orders
from saejax.data.layout import StoreSpec
from saejax.data.shards import open_store

C, T, D = 8, 5, 4


@pytest.fixture
def activations(tmp_path):
    """A run directory with two small stores; a row tells its context and its position."""
    for split, n_shards in (("train", 4), ("held_out", 1)):
        spec = StoreSpec(
            subject="tiny", subject_fingerprint="aa", text_fingerprint="bb", split=split,
            site="1.resid_post", d_model=D, context_length=T, first_position=1,
            contexts_per_shard=C, n_shards=n_shards,
        )  # fmt: skip
        store = open_store(tmp_path / "activations" / split, spec, "w")
        ids = np.random.default_rng(0).permutation(C * n_shards)
        for shard in range(n_shards):
            part = ids[shard * C : (shard + 1) * C]
            acts = np.zeros((C, T - 1, D), np.float32)
            acts[..., 0], acts[..., 1], acts[..., 2] = part[:, None], np.arange(T - 1), 1
            columns = {"context": part, "document": part * 0, "offset": part * T}
            store.write_shard(shard, acts, tokens=np.zeros((C, T), int), **columns)
        store.write_documents(["a"])
        store.finish()
    return tmp_path


def test_every_source_gives_every_row_once_an_epoch(activations):
    store = open_store(activations / "activations" / "train")
    rows, context = orders.text_order(store)
    assert (rows[:, 0] == context).all() and (np.diff(context) >= 0).all()
    sample, sources = orders.all_orders(store, 16, seed=0)
    assert len(sources) == 6 and sorted(map(tuple, sample)) == sorted(map(tuple, rows))
    for name, make in sources.items():
        batches = make().iterate()
        taken = np.concatenate([np.asarray(next(batches)) for _ in range(len(rows) // 16)])
        if "buffer" not in name:  # a buffer that holds more than an epoch repeats rows
            assert sorted(map(tuple, taken)) == sorted(map(tuple, rows)), name


def test_contexts_permuted_stay_whole():
    context = np.repeat(np.arange(50), 4)
    order = orders.contexts_permuted(context, seed=1)
    assert sorted(order) == list(range(200))
    assert (context[order].reshape(50, 4) == context[order][::4, None]).all()
    assert (np.diff(context[order]) < 0).any()


def test_a_swap_buffer_takes_each_row_once_and_delays_it_by_two_rounds_at_most():
    context = np.arange(400)
    order = orders.through_swap_buffer(context, batch_size=10, batches=4, seed=1)
    assert len(order) == 400 and len(set(order.tolist())) == 400
    entered = np.argsort(orders.contexts_permuted(context, 1))[order]
    # Contexts of one forward pass, 64 by default, are mixed before.
    assert (abs(np.arange(400) - entered) < 64 + 2 * 40).all() and (np.diff(entered) < 0).any()


def test_rows_of_a_context_enter_the_buffer_apart():
    context = np.repeat(np.arange(200), 8)
    order = orders.through_swap_buffer(context, batch_size=2, batches=1, seed=1)
    neighbours = np.mean(context[order][1:] == context[order][:-1])
    assert neighbours < 0.05
    whole = context[orders.contexts_permuted(context, seed=1)]
    assert np.mean(whole[1:] == whole[:-1]) > 0.8


def test_the_command_prints_a_line_an_order(activations, monkeypatch, capsys):
    every = orders.all_orders

    def one(store, batch_size, seed):
        sample, sources = every(store, batch_size, seed)
        return sample, {"exact permutation": sources["exact permutation"]}

    monkeypatch.setattr(orders, "all_orders", one)
    sizes = ["--batch_size", "16", "--latents", "8", "--k", "2", "--seeds", "3"]
    assert orders.main([str(activations), "--tokens", "64", *sizes]) == 0
    said = capsys.readouterr().out
    assert "seed 3, exact permutation: " in said and "+0.0%" in said
    assert orders.main([str(activations), "--tokens", "640", *sizes]) == 1
    assert "has 128 rows; give at most that" in capsys.readouterr().err
