"""What a checkpoint says of its run, and whether a run may go on from it."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from saejax import __version__, processes
from saejax import mesh as mesh_lib
from saejax.digests import DamageError
from saejax.model.normalizer import Normalizer
from saejax.recipe import Recipe
from saejax.rundir import result_of
from saejax.schema import config_differences
from saejax.train.spec import loss_spec, selection_metadata

_LOG = logging.getLogger(__name__)
_SAME_SCALE = 0.01  # rounding moves a measured scale far less, other activations far more
_PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")


def describe_run(
    recipe: Recipe,
    normalizer: Normalizer,
    identity: Mapping[str, str],
    mesh: Mesh,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What each checkpoint of a run says of it, beside its own step, tokens and window.

    The position in the data is the step alone: a batch is a pure function of (seed, step).
    """
    shape = mesh_lib.shape_of(mesh)
    spec = loss_spec(recipe.sae, recipe.loss, recipe.topk, shape.latent)
    config = {"json": {}, "gin": "", **(config or {})}
    as_text = json.dumps(config["json"], sort_keys=True)
    return {
        "sae": dataclasses.asdict(recipe.sae),
        "optimizer": dataclasses.asdict(recipe.optimizer),
        "normalizer": dataclasses.asdict(normalizer),
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size,
        "seed": recipe.train.seed,
        "identity": dict(identity),
        "selection": selection_metadata(spec, shape.latent),
        "config": {
            "json": json.loads(as_text),  # lists for tuples, as it will be read back
            "gin": config["gin"],
            "sha256": hashlib.sha256(as_text.encode()).hexdigest(),
        },
        "versions": {
            "saejax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "mesh": {
            "data": shape.data,
            "latent": shape.latent,
            "processes": processes.count(),
            "device": mesh.devices.flat[0].device_kind,
        },
    }


def accept(theirs: Mapping[str, Any], ours: Mapping[str, Any], allow_change: bool) -> None:
    """Compares the metadata of a checkpoint with those of the run that would go on from it.

    Args:
      theirs: of the checkpoint.
      ours: of this run, as `describe_run` made it.
      allow_change: log differences that decide the result, instead of refusing them.

    Raises:
      ValueError: naming what differs.
      DamageError: the checkpoint contradicts itself.
    """
    step = theirs["step"]
    if theirs["tokens"] != step * theirs["batch_size"]:
        raise DamageError(
            f"checkpoint {step} says {theirs['tokens']} tokens, which {step} steps of "
            f"{theirs['batch_size']} are not"
        )
    found = _differences(theirs, ours)
    if found and not allow_change:
        raise ValueError(
            f"checkpoint {step} was {'; and '.join(found)}; restore that, give another --workdir, "
            f"or go on with --allow_config_change"
        )
    if processes.index() > 0:
        return
    for line in found:
        _LOG.warning("checkpoint %d was %s: going on, as --allow_config_change says", step, line)
    if theirs["selection"] != ours["selection"]:
        _LOG.warning(
            "checkpoint %d selected latents with %s, this run does with %s: where a shard's "
            "capacity cuts candidates off, the two select differently; "
            "TopK.capacity_factor = None is exact on any mesh",
            step,
            theirs["selection"],
            ours["selection"],
        )
    for part in ("versions", "mesh"):
        for line in config_differences(theirs[part], ours[part]):
            _LOG.info("since checkpoint %d, %s.%s: equal up to rounding", step, part, line)


def kept_normalizer(theirs: Mapping[str, Any], measured: Normalizer) -> Normalizer:
    """The normaliser of a checkpoint where it is the measured one up to rounding, else that.

    Other devices or versions round activations otherwise, and with them a measured scale; weights
    go with the scale that they were trained with.
    """
    trained = Normalizer(**theirs)
    close = math.isclose(trained.scale, measured.scale, rel_tol=_SAME_SCALE)
    return trained if trained.kind == measured.kind and close else measured


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    found = []
    before, now = (result_of(about["config"]["json"]) for about in (theirs, ours))
    if before and now and (changed := config_differences(before, now)):
        shown = "; ".join(changed[:8]) + ("; ..." if len(changed) > 8 else "")
        found.append(f"trained with another configuration ({shown})")
    if theirs["identity"] != ours["identity"]:
        found.append(
            f"trained on other activations ({theirs['identity']}) than this run reads "
            f"({ours['identity']})"
        )
    measured = Normalizer(**ours["normalizer"])
    if kept_normalizer(theirs["normalizer"], measured) is measured:
        found.append(
            f"trained with normaliser {theirs['normalizer']}, while this run measured "
            f"{ours['normalizer']}"
        )
    return found
