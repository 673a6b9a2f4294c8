"""How the activations of a harvest are computed: what may change the last bits of a row.

A store's spec says what its rows are; hardware, versions and the size of a pass decide how they are
rounded. All shards of a store should agree in that, so that it is the same whoever made which.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jaxlib

from saejax.data.shards import Store
from saejax.subjects.base import Subject
from saejax.subjects.request import HarvestConfig


def computation_of(cfg: HarvestConfig, subject: Subject) -> dict[str, Any]:
    """How this process computes the rows of a harvest."""
    passes = {"batch_contexts": cfg.batch_contexts, "subject_shards": cfg.subject_shards}
    if not isinstance(subject, Subject):
        return {**getattr(subject, "computation", {"platform": "host"}), **passes}
    device = jax.local_devices()[0]
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    return {"platform": device.platform, "device": device.device_kind, **versions, **passes}


def check_computation(
    cfg: HarvestConfig,
    stores: Iterable[Store],
    ours: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Compares how this process computes with the first shard there is of unfinished stores.

    Raises:
      ValueError: naming what differs, unless `Harvest.allow_other_computation`.
    """
    for store in stores:
        shards = store.committed()
        if len(shards) in (0, store.spec.n_shards):
            continue
        begun = store.record(shards[0]).get("computation")
        differing = [
            f"{key} was {begun.get(key)!r}, is {ours.get(key)!r}"
            for key in sorted({*ours, *begun} if begun else ())
            if begun.get(key) != ours.get(key)
        ]
        if not differing:
            continue
        text = f"{store.path} was begun otherwise than this process computes it: "
        text += "; ".join(differing)
        if not cfg.allow_other_computation:
            raise ValueError(
                f"{text}. Its last shards would be rounded otherwise than its first ones: go on as "
                "it was begun, or accept that with Harvest.allow_other_computation = True."
            )
        log(f"{text}: accepted, and kept in the commit records")
