"""What is wished between steps: to stop, by a signal; to save, by the clock; and all agreeing."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax import mesh as mesh_lib
from saejax.checkpoint import CheckpointConfig
from saejax.data.feed import Feed

_LOG = logging.getLogger(__name__)
_NOTHING, _SAVE, _STOP = range(3)


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag, so that the step in progress is finished and saved."""

    def __init__(self):
        """Not asked to stop."""
        self._asked = False

    def __call__(self) -> bool:
        """Whether a signal arrived."""
        return self._asked

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Handles the signals while inside; a second Ctrl-C, a second later, acts as usual.

        A second SIGTERM does not: a cluster may repeat it while the save that it asked for goes on.
        """
        names = (signal.SIGTERM, signal.SIGINT)
        before = {name: signal.getsignal(name) for name in names}
        first = 0.0

        def handler(number, frame):
            nonlocal first
            if not self._asked:
                self._asked, first = True, time.monotonic()
                _LOG.info("%s: finishing the step, then saving", signal.Signals(number).name)
            elif number == signal.SIGINT and time.monotonic() - first > 1:
                for name in names:
                    signal.signal(name, before[name])
                signal.raise_signal(number)

        for name in names:
            signal.signal(name, handler)
        try:
            yield self
        finally:
            for name in names:
                signal.signal(name, before[name])


class AgreedWish:
    """The greatest wish of any process: the same answer in all of them, at the same step.

    Each call sends this process's wish into a maximum over all devices, and returns the outcome
    of the call before: that one is done, so no call waits for the step in progress.
    """

    def __init__(self, wish: Callable[[], int], mesh: Mesh):
        """Puts all answers, 0 to 2, on the devices, so that a step transfers nothing."""
        feed = Feed(mesh_lib.token_sharding(mesh), mesh.size)
        n_local = sum(last - first for first, last in feed.ranges)
        self._wish = wish
        self._votes = [feed.place(np.full((n_local, 1), vote, np.int32)) for vote in range(3)]
        scalar = {"wish": jax.ShapeDtypeStruct((), jnp.int32)}
        shardings = mesh_lib.tree_shardings(mesh, scalar)
        self._greatest = jax.jit(lambda votes: {"wish": votes.max()}, out_shardings=shardings)
        self._block = mesh.devices.flat[0].platform == "cpu"  # see train/loop.py
        self._outcome: jax.Array | None = None

    def __call__(self) -> int:
        """To be called once a step by every process."""
        before, self._outcome = self._outcome, self._greatest(self._votes[self._wish()])["wish"]
        if self._block:
            jax.block_until_ready(self._outcome)
        return 0 if before is None else int(jax.device_get(before))


class Wishes:
    """When to stop and when to save: by steps, by the clock of any process, by its signals."""

    def __init__(
        self,
        config: CheckpointConfig,
        stop_requested: Callable[[], bool],
        mesh: Mesh | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`mesh`, of several processes, makes their answers one; None for a process alone."""
        self._config, self._stop_requested, self._clock = config, stop_requested, clock
        self._saved = clock()
        self._ask = self._own if mesh is None else AgreedWish(self._own, mesh)
        self._wish = _NOTHING
        self._just_saved, self._lags = False, mesh is not None

    def _own(self) -> int:
        if self._stop_requested():
            return _STOP
        seconds = self._config.every_seconds
        late = seconds is not None and self._clock() - self._saved >= seconds
        return _SAVE if late else _NOTHING

    def stop(self) -> bool:
        """Whether to stop after this step; to be asked once a step, before `save`."""
        self._wish = self._ask()
        return self._wish == _STOP

    def save(self, step: int) -> bool:
        """Whether to save after this step."""
        every = self._config.every_steps
        # Among several processes the answer to this call's wish comes with the next: what was
        # wished before a save is no wish for another one.
        late = self._wish == _SAVE and not (self._lags and self._just_saved)
        due = late or (every is not None and step % every == 0)
        self._just_saved = due
        if due:
            self._saved = self._clock()
        return due
