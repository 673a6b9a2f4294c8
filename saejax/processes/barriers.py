"""Waiting for each other by name and with a deadline, on the host, without the devices.

A barrier that is not reached says which processes are missing: each tells the others, through the
coordination service, when it has arrived.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from saejax import watchdog
from saejax.processes import group
from saejax.processes.group import Group, PreemptedError
from saejax.processes.losses import LostError

_SLICE_SECONDS = 1.0  # between two looks at the clock, and at signals
_LATER_SECONDS = 10.0  # the stuck one shows its stack before those who wait for it give up
_FOREVER = float("inf")


class LeaderError(RuntimeError):
    """Process 0 failed at what it does for all; it has said why."""


def lead(name: str, action: Callable[[], Any], seconds: float | None = None) -> Any:
    """Lets process 0 act for all while the others wait.

    Args:
      name: of the action; every process makes the same calls in the same order.
      action: its result must be representable in JSON.
      seconds: how long the others wait; None is a little longer than the watchdog gives the phase
        they are in, which ends process 0 before that if it is stuck.

    Returns:
      The result, in every process.

    Raises:
      LeaderError: in the others, when the action failed in process 0, which raises its own error.
      PreemptedError: in the others, when process 0 was interrupted.
      LostError: process 0 was not done in time.
    """
    if group.count() == 1:
        return action()
    key, fault = _key(name), None
    if group.index() > 0:
        outcome = json.loads(_wait(key, name, [0], _deadline(seconds)))
    else:
        outcome, fault = _act(action)
        group.client().key_value_set(key, json.dumps(outcome))
    Group.ending = Group.ending or "result" not in outcome
    if "interrupted" in outcome:
        raise fault if isinstance(fault, KeyboardInterrupt) else PreemptedError
    if "error" in outcome:
        raise LeaderError(outcome["error"]) if fault is None else fault
    return outcome["result"]


def _act(action: Callable[[], Any]) -> tuple[dict[str, Any], BaseException | None]:
    """What the others are told of an action of process 0, and what it raised."""
    Group.leading = True
    try:
        outcome, fault = {"result": action()}, None
    except BaseException as error:
        outcome, fault = {"error": f"process 0 failed: {type(error).__name__}: {error}"}, error
    finally:
        Group.leading = False
    if Group.preempted or isinstance(fault, KeyboardInterrupt):  # or whatever became of it
        outcome = {"interrupted": True}
    return outcome, fault


def meet(name: str, seconds: float | None = None) -> None:
    """Waits until every process is here.

    Args:
      name: of the place; every process makes the same calls in the same order.
      seconds: as for `lead`.

    Raises:
      LostError: naming the processes that did not come in time.
    """
    gather(name, "", seconds)


def gather(name: str, text: str, seconds: float | None = None) -> list[str]:
    """What every process says, by index, in all of them; `meet` otherwise."""
    count, own = group.count(), group.index()
    if count == 1:
        return [text]
    key, until = _key(name), _deadline(seconds)
    group.client().key_value_set(f"{key}/{own}", text)
    if own > 0:
        return json.loads(_wait(f"{key}/all", name, list(range(count)), until, key))
    said = [text]
    for other in range(1, count):
        said.append(_wait(f"{key}/{other}", name, list(range(1, count)), until, key))
    group.client().key_value_set(f"{key}/all", json.dumps(said))
    return said


def part() -> None:
    """The end of a run that went well: waits for the others, whom it then does not surprise."""
    meet("the end")
    Group.ending = True


def _key(name: str) -> str:
    Group.steps += 1
    return f"saejax/{Group.steps}/{name}"


def _deadline(seconds: float | None) -> tuple[float, float]:
    """How long to wait, and until when; the watchdog of this process waits longer."""
    limit = watchdog.limit()
    if seconds is None:
        seconds = _FOREVER if limit is None else limit + _LATER_SECONDS
    longer = 0.0 if limit is None else max(seconds - limit, 0.0)
    watchdog.beat(grace=longer + _LATER_SECONDS)
    return seconds, time.monotonic() + seconds


def _wait(
    key: str, name: str, awaited: list[int], deadline: tuple[float, float], folder: str = ""
) -> str:
    """The value of a key, or LostError naming those of `awaited` with no key in `folder`."""
    seconds, until = deadline
    while (left := until - time.monotonic()) > 0:
        value = group.value_of(key, min(left, _SLICE_SECONDS))
        if value is not None:
            watchdog.beat()
            return value
    missing = [i for i in awaited if not folder or group.value_of(f"{folder}/{i}", 0.1) is None]
    text = f"process {group.index()} of {group.count()} waited {seconds:.0f} s at {name!r} for "
    text += f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    raise LostError(
        f"{text}, which did not come; the last messages there say why. Start all of them again: "
        f"the same command continues"
    )
