"""How a process joins the others: preflight, JAX, and a look at what came of it."""

import collections
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from saejax import __version__, watchdog
from saejax.processes.barriers import gather
from saejax.processes.losses import LostError
from saejax.processes.preflight import differences, preflight
from saejax.processes.settings import Settings, settings, slices

_UNDETECTED = (
    "SAEJAX_PROCESSES = 'auto', but JAX detects no cluster here; set it to the number of processes "
    "and set SAEJAX_COORDINATOR and SAEJAX_PROCESS_ID, or set it to 1 to run alone"
)
_LEAST_SECONDS = 60  # for JAX, after all processes were there


def join(config: Mapping[str, Any] | None = None) -> None:
    """Joins the other processes of this run, if there are any; call before any use of a device.

    Args:
      config: of the run, as JSON has it; must be the same in all of them.

    Raises:
      ValueError: the environment names no valid place among them; this process has no device; or
        they differ in what must be the same.
      LostError: they did not all start in time.
    """
    found = settings(os.environ)
    import jax

    if found is None or jax.distributed.is_initialized():
        return
    facts, left = facts_of(config), found.wait_seconds
    watchdog.beat(grace=left + 2 * _LEAST_SECONDS)  # who is missing is told before it is "stuck"
    if found.coordinator is not None:
        left = max(preflight(found, facts), _LEAST_SECONDS)
    _initialize(found, int(left))
    watchdog.name_process(jax.process_index(), jax.process_count())
    if found.coordinator is None:  # JAX found the others, and they could not speak before
        said = gather("what all must have in common", json.dumps(facts), found.wait_seconds)
        wrong = differences({i: json.loads(text) for i, text in enumerate(said)})
        if wrong:
            raise ValueError(wrong)
    _require_devices(found)
    if jax.process_index() > 0:
        logging.getLogger("saejax").setLevel(logging.ERROR)  # one process tells of progress


def facts_of(config: Mapping[str, Any] | None) -> dict[str, str]:
    """What must be the same in all processes."""
    import jax

    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "saejax": __version__,
        "jax": jax.__version__,
        "a configuration of hash": hashlib.sha256(text.encode()).hexdigest()[:12],
    }


def _initialize(found: Settings, seconds: int) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    try:
        limits = {
            "initialization_timeout": seconds,
            "heartbeat_timeout_seconds": found.heartbeat_seconds,
            "shutdown_timeout_seconds": 30,
        }
        jax.distributed.initialize(found.coordinator, found.count, found.index, **limits)
    except (RuntimeError, ValueError) as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise LostError(missing(found)) from error
        if found.count is None and "be defined" in str(error):
            raise ValueError(_UNDETECTED) from error
        raise LostError(f"{found} could not join the others: {error}") from error


def _require_devices(found: Settings) -> None:
    import jax

    try:
        jax.local_devices()
    except RuntimeError as error:
        fix = "start at most as many processes as there are devices, or set JAX_PLATFORMS=cpu"
        raise ValueError(f"{found} has no device; {fix} ({error})") from error
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        often = collections.Counter(counts.values())
        usual = max(often, key=lambda n: (often[n], n))
        wrong = [f"process {i} has {n}" for i, n in sorted(counts.items()) if n != usual]
        raise ValueError(
            f"{', '.join(wrong)} device(s), and the others {usual}; give all processes as many"
        )
    wanted, here = slices(os.environ), {getattr(d, "slice_index", None) for d in jax.devices()}
    if wanted is not None and None not in here and len(here) != wanted:
        raise ValueError(
            f"MEGASCALE_NUM_SLICES = {wanted}, but the devices are those of {len(here)} slice(s): "
            f"left from an earlier start? Set it to the slices of this one"
        )


def missing(found: Settings) -> str:
    """What to say of others that did not start, where nobody knows which."""
    others = "the others" if found.count is None else f"all {found.count}"
    return (
        f"{found} waited {found.wait_seconds} s for {others} to start; start the missing ones with "
        f"the same SAEJAX_COORDINATOR and SAEJAX_PROCESSES, or wait longer with SAEJAX_WAIT_SECONDS"
    )
