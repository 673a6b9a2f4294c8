"""`python -m saejax.main --verify --workdir=...`: is what a run directory holds what was written?

Reads every byte of every checkpoint and of every activation store, and changes nothing.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from saejax.checkpoint import Checkpoints
from saejax.data.shards import open_store
from saejax.rundir import RunDirectory
from saejax.steps import StepFolders

_SOUND = "sound"
_STORE = ("spec.json", "manifest.json", "acts", "contexts", "commits")


class Finding(NamedTuple):
    """One line of the table.

    Attributes:
      what: was looked at.
      size: of it in bytes.
      result: 'sound', or what is wrong, with the file or array in question.
    """

    what: str
    size: int
    result: str


def verify(workdir: pathlib.Path) -> int:
    """Prints a table of what a run directory holds; 0 if all of it is sound, 1 otherwise.

    Raises:
      FileNotFoundError: there is nothing to verify.
    """
    findings = []
    for finding in find(workdir):
        findings.append(finding)
        print(f"{finding.what:<56} {finding.size:>16,}  {finding.result}", flush=True)
    if not findings:
        raise FileNotFoundError(
            f"workdir = {workdir} holds neither checkpoints nor activations; give a run directory"
        )
    bad = sum(finding.result != _SOUND for finding in findings)
    print(f"{len(findings)} looked at, {bad} damaged" if bad else f"all {len(findings)} sound")
    return 1 if bad else 0


def find(workdir: pathlib.Path) -> Iterator[Finding]:
    """Looks at checkpoints, newest first, then at stores; one at a time."""
    run = RunDirectory(workdir)
    # Of the run itself, or of several in folders of their own.
    for folder in (run.checkpoints, *sorted(run.path.glob("*/checkpoints"))):
        store = Checkpoints(folder, alone=True)
        where = "" if folder == run.checkpoints else f"{folder.parent.name}: "
        if not store.steps() and (damaged := StepFolders(folder).damaged()):
            yield Finding(f"{where}checkpoints", 0, f"none is whole: {', '.join(damaged)}")
        for step in reversed(store.steps()):
            yield from _checkpoint(store, step, where)
    for path in sorted({p.parent for name in _STORE for p in run.activations.rglob(name)}):
        yield _store(path, run.path)


def _checkpoint(store: Checkpoints, step: int, where: str) -> Iterator[Finding]:
    """The files of a step together, then each of its arrays as it comes to a device."""
    what = f"{where}checkpoint {step}"
    try:
        metadata = store.check_files(step)
    except (OSError, ValueError) as error:
        if step in store.steps():  # else a run that goes on has deleted it meanwhile
            yield Finding(what, 0, str(error))
        return
    size = sum(size for size, _ in metadata["files"].values())
    yield Finding(f"{what}: {len(metadata['files'])} files", size, _SOUND)
    for name, about in metadata["arrays"].items():
        try:
            sound = store.array_is_sound(step, metadata, name)
            result = _SOUND if sound else "its digest is not the one that was saved"
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            result = f"cannot be read: {' '.join(str(error).split())}"
        elements = 1
        for length in about["shape"]:
            elements *= length
        yield Finding(
            f"{what}: {name} {about['dtype']}{about['shape']}",
            elements * jnp.dtype(about["dtype"]).itemsize,
            result,
        )


def _store(path: pathlib.Path, root: pathlib.Path) -> Finding:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        open_store(path).verify()
    except (OSError, ValueError) as error:
        return Finding(str(path.relative_to(root)), size, " ".join(str(error).split()))
    return Finding(str(path.relative_to(root)), size, _SOUND)
