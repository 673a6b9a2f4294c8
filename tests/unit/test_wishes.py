"""When to save and when to stop, in one process and agreed among several."""

import signal

import pytest

from saejax import mesh as mesh_lib
from saejax import wishes
from saejax.checkpoint import CheckpointConfig
from saejax.mesh import MeshShape
from saejax.wishes import AgreedWish, StopSignal, Wishes


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def saves(config: CheckpointConfig, seconds_a_step: float, steps: int = 12, mesh=None) -> list[int]:
    clock = Clock()
    asked, found = Wishes(config, lambda: False, mesh, clock), []
    for step in range(1, steps + 1):
        clock.now += seconds_a_step
        assert not asked.stop()
        if asked.save(step):
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("every_steps", "every_seconds", "found"),
    [
        (5, None, [5, 10]),
        (None, 30.0, [3, 6, 9, 12]),
        (5, 30.0, [3, 5, 8, 10]),  # each save begins the time anew
        (5, 1e9, [5, 10]),
        (1, 30.0, list(range(1, 13))),
    ],
)
def test_a_save_is_due_by_steps_and_by_the_clock(every_steps, every_seconds, found):
    config = CheckpointConfig(every_steps=every_steps, every_seconds=every_seconds)
    assert saves(config, 10.0) == found


def test_a_repeated_sigterm_does_not_end_the_save_that_the_first_one_asked_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(wishes.time, "monotonic", lambda: now[0])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
    try:
        with StopSignal().listening() as stop:
            assert not stop()
            for now[0] in (10.0, 20.0, 30.0):
                signal.raise_signal(signal.SIGTERM)
                assert stop()
            with pytest.raises(KeyboardInterrupt):  # a person means it
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_among_several_the_clock_is_heard_a_step_later():
    config = CheckpointConfig(every_steps=None, every_seconds=30.0)
    mesh = mesh_lib.make_mesh(MeshShape(2, 4))
    assert saves(config, 10.0, mesh=mesh) == [4, 8, 12]  # once, not twice
    assert saves(CheckpointConfig(every_steps=5, every_seconds=None), 10.0, mesh=mesh) == [5, 10]


def test_a_stop_outweighs_a_save():
    answers = iter([False, True, True])
    clock = Clock()
    asked = Wishes(CheckpointConfig(every_seconds=1.0), lambda: next(answers), None, clock)
    clock.now = 5.0
    assert not asked.stop() and asked.save(1)
    assert asked.stop()


@pytest.mark.parametrize("shape", [MeshShape(1, 1), MeshShape(2, 4)])
def test_the_outcome_is_the_greatest_wish_of_the_call_before(shape):
    said = iter([0, 2, 1, 0, 0])
    agreed = AgreedWish(lambda: next(said), mesh_lib.make_mesh(shape))
    assert [agreed() for _ in range(5)] == [0, 0, 2, 1, 0]
