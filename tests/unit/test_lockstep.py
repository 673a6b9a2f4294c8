"""Several trainings in turn from one pass."""

import itertools
import threading
import types

import pytest

from saejax.lockstep import Ended, together

OWN = types.SimpleNamespace(d_model=3, tokens_per_epoch=7, sample_rows=lambda n: list(range(n)))


def reading(first, n, seen):
    """A training that reads n batches from `first` on."""

    def training(batches):
        assert (batches.d_model, batches.tokens_per_epoch, batches.sample_rows(2)) == (3, 7, [0, 1])
        for batch in itertools.islice(batches.iterate(first), n):
            seen.append(batch)
        return sum(1 for _ in range(n))

    return training


def numbers(started):
    def iterate(step):
        started.append(step)
        return ({"a": ("a", i), "b": ("b", i)} for i in itertools.count(step))

    return iterate


def test_each_reads_its_own_batches_in_turn():
    order, started = [], []
    jobs = {"a": (OWN, reading(0, 3, order)), "b": (OWN, reading(0, 3, order))}
    assert together(jobs, numbers(started)) == {"a": 3, "b": 3}
    assert order == [(name, i) for i in range(3) for name in "ab"] and started == [0]


def test_one_that_is_ahead_waits_and_one_that_is_shorter_leaves():
    order, started = [], []
    jobs = {"a": (OWN, reading(4, 2, order)), "b": (OWN, reading(2, 6, order))}
    together(jobs, numbers(started))
    assert started == [2]
    assert [i for name, i in order if name == "a"] == [4, 5]
    assert [i for name, i in order if name == "b"] == [2, 3, 4, 5, 6, 7]


def test_one_that_reads_nothing_is_no_matter():
    order = []
    jobs = {"a": (OWN, lambda batches: "done"), "b": (OWN, reading(0, 2, order))}
    assert together(jobs, numbers([]))["a"] == "done" and len(order) == 2
    assert together({"a": (OWN, lambda batches: 1)}, numbers([])) == {"a": 1}


@pytest.mark.parametrize("at", [0, 2])
def test_an_error_ends_all_and_is_raised(at):
    ended = []

    def failing(batches):
        for i, _ in enumerate(batches.iterate(0)):
            if i == at:
                raise FloatingPointError("loss")

    def endless(batches):
        try:
            for _ in batches.iterate(0):
                pass
        except Ended:
            ended.append(True)
            raise

    threads = threading.active_count()
    with pytest.raises(FloatingPointError, match="loss"):
        together({"a": (OWN, endless), "b": (OWN, failing)}, numbers([]))
    assert ended == [True] and threading.active_count() == threads


def test_an_error_of_the_pass_ends_all():
    def iterate(step):
        yield {"a": 1, "b": 1}
        raise ValueError("no more")

    endless = lambda batches: [None for _ in batches.iterate(0)]  # noqa: E731
    threads = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        together({"a": (OWN, endless), "b": (OWN, endless)}, iterate)
    assert threading.active_count() == threads


def test_only_one_runs_at_a_time():
    running, most = [0], [0]

    def careful(batches):
        for _ in itertools.islice(batches.iterate(0), 50):
            running[0] += 1
            most[0] = max(most[0], running[0])
            running[0] -= 1

    together({str(i): (OWN, careful) for i in range(4)}, lambda step: (
        {str(i): i for i in range(4)} for _ in itertools.count(step)
    ))  # fmt: skip
    assert most == [1]


def test_one_that_goes_back_is_fed_again_from_there():
    order, started = [], []

    def back(batches):
        for start, n in ((0, 4), (1, 5)):
            order.extend(itertools.islice(batches.iterate(start), n))

    together({"a": (OWN, back), "b": (OWN, reading(0, 8, order))}, numbers(started))
    assert [i for name, i in order if name == "a"] == [0, 1, 2, 3, 1, 2, 3, 4, 5]
    assert [i for name, i in order if name == "b"] == list(range(8)) and started == [0, 1]
