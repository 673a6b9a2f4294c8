"""Training that diverged goes back to the last good checkpoint, once from each."""

import logging
from collections.abc import Callable
from typing import Protocol

from saejax import processes
from saejax.train import guard
from saejax.train.hooks import DivergedError
from saejax.types import TrainState

_LOG = logging.getLogger(__name__)


class Place(Protocol):
    """Where training goes on: a checkpoint, or step 0."""

    step: int
    state: TrainState


def train_through(
    begin: Place, steps: Callable[[Place], TrainState], back: Callable[[int], Place]
) -> TrainState:
    """Trains to the end, and goes back where that diverges.

    Args:
      begin: where to begin.
      steps: trains from a place on.
      back: the newest place that is no later than a step, and what follows it set aside.

    Raises:
      FloatingPointError: it diverged twice from the same place.
    """
    rollbacks = Rollbacks()
    while True:
        try:
            return steps(begin)
        except DivergedError as error:
            fault = error.with_traceback(None)  # whose frames hold the state
        begin = back(fault.first - 1)
        rollbacks.require_new(fault, begin.step, begin.state)


class Rollbacks:
    """The checkpoints that training returned to so far.

    The same steps from the same state on the same batches give the same numbers: only what a
    machine did wrong is mended by going back. What happens twice is in the weights or the data.
    """

    def __init__(self):
        """None yet."""
        self._places: set[int] = set()

    def require_new(self, fault: DivergedError, step: int, state: TrainState) -> None:
        """Called with the checkpoint that training would go on from.

        Raises:
          FloatingPointError: it did already, or its weights are bad; what is wrong, and what to do.
        """
        place = f"checkpoint {step}" if step else "the start"
        if not guard.all_finite(state.params):
            raise FloatingPointError(
                f"{fault}; the weights of {place} hold values that are not finite, and no older "
                f"checkpoint can be returned to: delete or rename it, and the same command goes on "
                f"from the one before"
            )
        if step in self._places:
            raise FloatingPointError(f"{fault}, a second time since {place}: {_advice(fault)}")
        self._places.add(step)
        if processes.index() == 0:
            _LOG.warning("%s: going back to %s, once", fault, place)


def _advice(fault: DivergedError) -> str:
    if fault.finite:
        return (
            "the weights there are finite, and so are these losses and gradients, but far above "
            "those before: training diverges here. Lower Optimizer.learning_rate or set "
            "Optimizer.clip_norm, in another workdir; or set Guard.spike_deviations = None if it "
            "should go through"
        )
    return (
        "the weights there are finite, so the activations of these batches hold values that are "
        "not (mend the data), or training had diverged before them (lower Optimizer.learning_rate "
        "or set Optimizer.clip_norm, in another workdir)"
    )
