"""Checkpoints: the whole training state and what is needed to use it, in one step folder.

The promise: a run that is killed at any moment comes back from its newest whole checkpoint and ends
bit-identical to one that was not; what was damaged on disk meanwhile, by a single bit or by a
missing file, is found before it is used, named, set aside (never deleted), and the step before it
is used; where none is left, the run stops instead of starting anew.

    <step>/state/            all arrays of the state, by Orbax
    <step>/metadata.json     sealed (digests.py): what the state is and comes from; shape, dtype and
                             digest of each array; size and checksum of each file of state/

The only file that imports orbax. The names and lives of step folders are in `steps.py`.
"""

import dataclasses
import hashlib
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from saejax import digests
from saejax.digests import DamageError, describe
from saejax.peers import Peers
from saejax.steps import StepFolders
from saejax.types import TrainState

_LOG = logging.getLogger(__name__)
_FORMAT = 2
_STATE = "state"
_METADATA = "metadata.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep; the last step is always saved.

    Attributes:
      every_steps: save after every so many steps; None leaves it to the clock.
      every_seconds: save when so long has passed since the last save; None leaves it to the steps.
      keep: newest checkpoints kept; None keeps all.
      keep_every: beside those, keep for good the first checkpoint at or after each multiple of so
        many steps; None keeps no more.
    """

    every_steps: int | None = 1000
    every_seconds: float | None = 600.0
    keep: int | None = 2
    keep_every: int | None = None

    def __post_init__(self):
        for field, none in (
            ("every_steps", "leave it to every_seconds"),
            ("keep", "keep all"),
            ("keep_every", "keep no more"),
        ):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} = {value} must be at least 1, or None to {none}")
        if self.every_seconds is not None and not self.every_seconds > 0:
            raise ValueError(
                f"every_seconds = {self.every_seconds} must be above 0, or None to leave it to "
                f"every_steps"
            )
        if self.every_steps is None and self.every_seconds is None:
            raise ValueError(
                "every_steps and every_seconds are both None: nothing would be saved before the "
                "end; set one of them"
            )


class Checkpoints:
    """The checkpoints of one run: `directory/<step>/`."""

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int | None = None,
        keep_every: int | None = None,
        *,
        alone: bool = False,
    ):
        """Names the folder of checkpoints, which the first save creates.

        Args:
          directory: all processes must see the same.
          keep, keep_every: which are kept, see `CheckpointConfig`.
          alone: this process reads by itself. Without it, several processes make every call
            together: each writes and reads its own shards, and one fault is a fault for all.
        """
        self.directory = directory.absolute()
        self._folders = StepFolders(self.directory)
        self._keep, self._keep_every = keep, keep_every
        self._peers = Peers(alone=alone)
        self._writer: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    # --- Writing ----------------------------------------------------------------------------------

    def prepare(self, state_bytes: int) -> None:
        """Clears what a killed process has left, and makes sure that the disk has room.

        For one process, before training.

        Raises:
          OSError: fewer bytes are free than the checkpoints to be kept, and one more, will need.
        """
        self._folders.clear()
        self._folders.require_space(state_bytes, self._keep, self._keep_every)

    def save(self, state: TrainState, metadata: Mapping[str, Any], doubtful: bool = False) -> None:
        """Starts to write a state and its JSON metadata as step `state.step`.

        Returns when the state is copied to the host and may be donated; the rest is done in the
        background (`check`, `wait`). The step folder appears under its name when all of it is on
        disk. A `doubtful` one replaces none: training may have to go back to before it.

        Raises:
          OSError: this step or the one before cannot be written, or is there already.
        """
        self.wait()
        step = int(state.step)
        arrays = _named(state)
        content = {"format": _FORMAT, "step": step, **metadata}
        sums = digests.array_digests(arrays)  # among several, the loss of one is no fault of a disk
        try:
            if self._peers.first:
                self._folders.begin(step)
            self._writer = self._writer or self._make_writer()
            target = self._folders.saving(step) / _STATE
            self._writer.save(target, args=ocp.args.PyTreeSave(arrays))
        except (OSError, ValueError) as error:
            raise self._unwritten(step, error) from error
        content["arrays"] = {
            name: {"shape": list(x.shape), "dtype": x.dtype.name, "digest": sums[name]}
            for name, x in arrays.items()
        }
        what = {"args": (step, content, doubtful), "name": f"checkpoint {step}"}
        self._thread = threading.Thread(target=self._finish, **what, daemon=True)
        self._thread.start()

    def _make_writer(self) -> ocp.AsyncCheckpointer:
        # Several trainings may save at once, and must not meet at each other's barriers.
        own = {"barrier_sync_key_prefix": hashlib.sha256(str(self.directory).encode()).hexdigest()}
        among = {"multiprocessing_options": ocp.options.MultiprocessingOptions(**own)}
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False, **among)
        return ocp.AsyncCheckpointer(handler, **among)

    def _finish(self, step: int, content: dict[str, Any], doubtful: bool) -> None:
        try:
            self._writer.wait_until_finished()
            folder = self._folders.saving(step)
            files = self._peers.file_sums(folder / _STATE, folder / "sums")
            if self._peers.first:
                digests.write_sealed(folder / _METADATA, content | {"files": files})
                self._folders.commit(step)
                if not doubtful:
                    self._folders.prune(self._keep, self._keep_every)
        except BaseException as error:  # raised by `check`, in the thread that trains
            self._failure = step, error

    def check(self) -> None:
        """Raises OSError if the save in the background has failed: which step, and why."""
        if self._failure is not None:
            (step, error), self._failure = self._failure, None
            lost = error if isinstance(error, jax.errors.JaxRuntimeError) else error.__cause__
            if self._peers.count > 1 and isinstance(lost, jax.errors.JaxRuntimeError):
                raise lost  # another process is gone, which the caller tells better
            raise self._unwritten(step, error) from error

    def _unwritten(self, step: int, error: BaseException) -> OSError:
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())
        whole = ", ".join(map(str, self._folders.whole()[-4:])) or "none"
        return OSError(
            f"checkpoint {step} could not be written to {self.directory} ({_brief(cause)}); steps "
            f"that are whole: {whole}. Mend the cause, then the same command continues"
        )

    def wait(self) -> None:
        """Waits until nothing is written any more; raises as `check` does."""
        if self._thread is not None:
            began = time.monotonic()
            self._thread.join()
            self._thread = None
            if (seconds := time.monotonic() - began) > 1:
                _LOG.info("waited %.1f s for the checkpoint before to be written", seconds)
        self.check()

    def truncate(self, after_step: int) -> None:
        """Sets later steps aside as `<step>.undone-<n>`, so that they can be written anew.

        Among several processes, all call it.
        """
        self.wait()
        if self._peers.first:
            for step in self._folders.whole():
                if step > after_step:
                    self._folders.set_aside(step, "undone")
        self._peers.gather(None)

    def close(self) -> None:
        """Waits for the save in progress and releases what is held."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    # --- Reading ----------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps that were written to their end, in order."""
        return self._folders.whole()

    def latest(self) -> int | None:
        """The newest of `steps`, or None."""
        return max(self.steps(), default=None)

    def restore_newest(
        self, abstract: TrainState, accept: Callable[[dict[str, Any]], None]
    ) -> tuple[int, TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is sound; those found damaged on the way are set aside.

        Args:
          abstract: shapes, dtypes and shardings to restore into.
          accept: raises ValueError for metadata of another run, which is no damage.

        Returns:
          Step, state and metadata; None if nothing was ever saved here.

        Raises:
          OSError: there were checkpoints, but none is sound.
          ValueError: the newest sound one is of another run, or holds other arrays.
        """
        while (step := self._agreed_newest()) is not None:
            try:
                return step, *self._read(step, abstract, accept)
            except DamageError as error:
                if self._peers.first:
                    aside = self._folders.set_aside(step, "damaged")
                    _LOG.warning("checkpoint %d is damaged, now %s: %s", step, aside.name, error)
                self._peers.gather(None)
        damaged = self._folders.damaged() if self._peers.first else []
        if text := self._peers.from_first(", ".join(damaged) or None):
            raise OSError(
                f"no checkpoint in {self.directory} is sound: {text}. Training does not begin "
                f"anew in this folder; restore one of them from a copy, delete the folder to begin "
                f"anew, or give another --workdir"
            )
        return None

    def _agreed_newest(self) -> int | None:
        # Decided by one process: on a shared file system others may see a folder later.
        newest = self._folders.whole()[-1:] if self._peers.first else []
        text = self._peers.from_first(str(newest[0]) if newest else None)
        return None if text is None else int(text)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads one step into the shapes, dtypes and shardings of `abstract`.

        Raises:
          DamageError: it is not what was written; it is left where it is.
          FileNotFoundError: there is no such step.
          ValueError: it holds other arrays, dtypes or shapes; each one is named.
        """
        self._require(step)
        return self._read(step, abstract, lambda metadata: None)[0]

    def _read(
        self, step: int, abstract: TrainState, accept: Callable[[dict[str, Any]], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        metadata = self._peers.together(lambda: self._checked(step))
        accept(metadata)
        wanted = _named(abstract)
        self._check_arrays(step, metadata["arrays"], wanted)
        try:
            arrays = self._load(step, wanted)
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            # Its bytes are those that were written: another step would fail as this one does.
            raise OSError(
                f"checkpoint {self._folders.path(step)} is whole, but cannot be restored "
                f"({_brief(' '.join(str(error).split()))})"
            ) from error
        found = digests.array_digests(arrays)
        for name, about in metadata["arrays"].items():
            if found[name] != about["digest"]:
                raise DamageError(
                    f"array {name} of {self._folders.path(step)} has digest {found[name]}, but "
                    f"{about['digest']} was saved"
                )
        if int(arrays["step"]) != step:
            raise DamageError(f"{self._folders.path(step)} holds step {int(arrays['step'])}")
        return jax.tree.unflatten(jax.tree.structure(abstract), arrays.values()), metadata

    def _checked(self, step: int) -> dict[str, Any]:
        """The metadata of a step, after this process's share of its files was compared with it."""
        metadata, folder = self._metadata(step), self._folders.path(step)
        digests.check_listing(folder / _STATE, metadata["files"])
        names = self._peers.share(list(metadata["files"]))
        digests.check_files(folder / _STATE, metadata["files"], names)
        return metadata

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step.

        Raises:
          DamageError: it is not what was written.
          FileNotFoundError: there is no such step.
          ValueError: it was written in a format this version does not read.
        """
        self._require(step)
        return self._metadata(step)

    def _require(self, step: int) -> None:
        if step not in self.steps():
            raise FileNotFoundError(
                f"no checkpoint {step} in {self.directory}; present: {self.steps()}"
            )

    def _metadata(self, step: int) -> dict[str, Any]:
        folder = self._folders.path(step)
        old = (folder / "metadata").is_dir() and not (folder / _METADATA).exists()
        metadata = {"format": 1} if old else digests.read_sealed(folder / _METADATA)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"checkpoint {folder} has format {metadata.get('format')!r}; this version reads "
                f"format {_FORMAT}"
            )
        if metadata["step"] != step:
            raise DamageError(f"{folder} holds step {metadata['step']}")
        return metadata

    def _check_arrays(self, step: int, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        # Orbax casts dtypes silently and reports shapes one by one: compare all of them first.
        wrong = []
        for name in sorted(stored | wanted, key=lambda n: (not n.startswith("params."), n)):
            about = stored.get(name)
            have = "absent" if about is None else f"{about['dtype']}{about['shape']}"
            if have != (want := describe(wanted.get(name))):
                wrong.append(f"{name} is {have}, the configuration needs {want}")
        if wrong:
            raise ValueError(
                f"checkpoint {self._folders.path(step)} does not fit: {'; '.join(wrong[:6])}"
                + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
                + ". Restore the configuration it was trained with, or use another workdir"
            )

    def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, jax.Array]:
        # Each process reads its own shards without waiting for others, which may fail on theirs.
        own = jax.process_index()
        among = ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"alone{own}"
        )
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, multiprocessing_options=among)
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=how)
        with ocp.Checkpointer(handler, multiprocessing_options=among) as reader:
            found = reader.restore(self._folders.path(step) / _STATE, args=args)
        return {name: found[name] for name in wanted}

    def check_files(self, step: int) -> dict[str, Any]:
        """Compares every file of a step with its checksum; the metadata.

        Raises:
          DamageError: naming the file that is not what was written.
          ValueError: it was written in a format this version does not read.
        """
        return self._checked(step)

    def array_is_sound(self, step: int, metadata: dict[str, Any], name: str) -> bool:
        """Reads one array to a device of this process; whether its digest is the saved one."""
        about = metadata["arrays"][name]
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        want = jax.ShapeDtypeStruct(about["shape"], np.dtype(about["dtype"]), sharding=device)
        tree = dict.fromkeys(metadata["arrays"], ocp.PLACEHOLDER) | {name: want}
        found = digests.array_digests({name: self._load(step, tree)[name]})
        return found[name] == about["digest"]


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a state by dotted name: `params.w_enc`, `opt_state.0.mu.w_enc`, `step`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_path(path): leaf for path, leaf in leaves}


def _path(path: tuple) -> str:
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return ".".join(str(key) for key in keys)


def _brief(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-90:]}"
