"""Several trainings fed by one pass over the activations, a step of each in turn.

Each training runs in a thread of its own, and only one of them at a time: from the moment it gets a
batch until it asks for the next. So every process of a mesh dispatches the same programs in the
same order, and a training cannot tell that it is not alone.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from saejax.data.feed import Ranges

T = TypeVar("T")


class Ended(Exception):
    """Another training failed; raised in those that were waiting for a batch."""


class _Seat:
    """One training: what it waits for, and what came of it."""

    def __init__(self, name: str):
        self.name = name
        self.wanted: int | None = None  # the step whose batch it waits for
        self.batch: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)

    def ask(self, step: int) -> Any:
        """In its thread: gives the turn back until there is the batch of `step`."""
        self.wanted = step
        self.back.release()
        self.go.acquire()
        if self.error is not None:
            raise self.error
        return self.batch

    def turn(self) -> None:
        """In the main thread: lets it run until it asks again, or ends."""
        self.go.release()
        self.back.acquire()


class SharedBatches:
    """What one training sees of the pass: `iterate` is shared, all else is its own source's."""

    def __init__(self, own: Any, seat: _Seat):
        """`own` has `d_model`, `tokens_per_epoch` and `sample_rows(n)`."""
        self.d_model, self.tokens_per_epoch = own.d_model, own.tokens_per_epoch
        self.sample_rows, self._seat = own.sample_rows, seat

    def iterate(self, start_step: int = 0, ranges: Ranges | None = None) -> Iterator[Any]:
        """Batches from `start_step` on."""
        del ranges  # the shared batches are on the devices already
        step = start_step
        while True:
            yield self._seat.ask(step)
            step += 1


def together(
    trainings: Mapping[str, tuple[Any, Callable[[SharedBatches], T]]],
    iterate: Callable[[int], Iterable[Mapping[str, Any]]],
) -> dict[str, T]:
    """Runs trainings to their ends, each from its own step on.

    Args:
      trainings: by name, the source of one (see `SharedBatches`) and the training, called with what
        it is to read.
      iterate: starts the pass at a step; every batch of it is a mapping from name to batch.

    Returns:
      What each training returned, by name.

    Raises:
      BaseException: what the first training to fail raised; the others have ended by then.
    """
    seats = {name: _Seat(name) for name in trainings}
    threads = [
        threading.Thread(target=_run, args=(seats[name], *parts), name=name, daemon=True)
        for name, parts in trainings.items()
    ]
    for thread in threads:
        thread.start()
    try:
        for seat in seats.values():
            _advance(seat)
        _feed(list(seats.values()), iterate)
    finally:
        for seat in seats.values():
            if not seat.done:
                seat.error = Ended(f"{seat.name}: another training failed")
                seat.turn()
        for thread in threads:
            thread.join()
    return {name: seat.result for name, seat in seats.items()}


def _feed(seats: list[_Seat], iterate: Callable[[int], Iterable[Mapping[str, Any]]]) -> None:
    while waiting := [seat for seat in seats if not seat.done]:
        _pass(waiting, iterate, min(seat.wanted for seat in waiting))


def _pass(seats: list[_Seat], iterate, step: int) -> None:
    """Feeds the seats from `step` on, until they are done or one wants to go back."""
    for batch in iterate(step):
        for seat in seats:
            if seat.wanted == step:  # one that was saved later than the others comes in later
                seat.batch = batch[seat.name]
                _advance(seat)
        seats = [seat for seat in seats if not seat.done]
        if not seats or any(seat.wanted <= step for seat in seats):
            return
        step += 1


def _advance(seat: _Seat) -> None:
    seat.turn()
    if seat.done and seat.error is not None:
        raise seat.error


def _run(seat: _Seat, own: Any, training: Callable[[SharedBatches], Any]) -> None:
    seat.go.acquire()
    try:
        if seat.error is None:
            seat.result = training(SharedBatches(own, seat))
    except BaseException as error:  # of this thread: raised again in the main one
        seat.error = error
    finally:
        seat.done = True
        seat.back.release()
