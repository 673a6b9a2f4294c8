"""Checkpoints: the whole training state and what is needed to use it, in one step folder.

The only file that imports orbax. A step folder appears under its final name when it is complete.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from saejax.types import TrainState

_FORMAT = 1
_STATE = "state"
_METADATA = "metadata"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every_steps: save after every so many steps, and always after the last one.
      keep: newest checkpoints kept; None keeps all.
    """

    every_steps: int = 1000
    keep: int | None = 2

    def __post_init__(self):
        if self.every_steps < 1:
            raise ValueError(f"every_steps = {self.every_steps} must be at least 1")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep = {self.keep} must be at least 1, or None to keep all")


class Checkpoints:
    """The checkpoints of one run: `directory/<step>/`."""

    def __init__(self, directory: pathlib.Path, keep: int | None = None, *, alone: bool = False):
        """Opens (and creates on the first save) the folder of checkpoints.

        Args:
          directory: the folder; all processes must see the same.
          keep: newest checkpoints kept; None keeps all.
          alone: this process reads by itself. Without it, several processes make every call
            together, and each writes and reads its own shards.
        """
        self.directory = directory.absolute()
        among = ocp.options.MultiprocessingOptions()
        if alone and jax.process_count() > 1:
            own = jax.process_index()
            among = ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"alone{own}"
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=not alone,
                enable_async_checkpointing=False,
                multiprocessing_options=among,
            ),
            item_handlers={
                _STATE: ocp.StandardCheckpointHandler(multiprocessing_options=among),
                _METADATA: ocp.JsonCheckpointHandler(multiprocessing_options=among),
            },
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Writes a state and its JSON metadata as step `state.step`.

        Raises:
          OSError: nothing was written, e.g. a newer step is already there.
        """
        step = int(state.step)
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(state),
                    _METADATA: ocp.args.JsonSave({"format": _FORMAT, **metadata}),
                }
            ),
        )
        if not saved:
            raise OSError(
                f"checkpoint {step} was not written to {self.directory}; its newest step is "
                f"{self.latest()}"
            )

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step.

        Raises:
          FileNotFoundError: there is no such step.
          ValueError: it was written in a format this version does not read.
        """
        if step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"no checkpoint {step} in {self.directory}; present: "
                f"{sorted(self._manager.all_steps())}"
            )
        args = ocp.args.Composite(**{_METADATA: ocp.args.JsonRestore()})
        metadata = self._manager.restore(step, args=args)[_METADATA]
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} has format {metadata.get('format')!r}; "
                f"this version reads format {_FORMAT}"
            )
        return metadata

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads a state into the shapes, dtypes and shardings of `abstract`.

        Raises:
          ValueError: the checkpoint holds other arrays, dtypes or shapes; each one is named.
        """
        self._check_arrays(step, abstract)
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(abstract)})
        return self._manager.restore(step, args=args)[_STATE]

    def _check_arrays(self, step: int, abstract: TrainState) -> None:
        # Orbax casts dtypes silently and reports shapes one by one: compare all of them first.
        stored_tree = self._manager.item_metadata(step)[_STATE]
        stored = {_path(path): leaf for path, leaf in _leaves(stored_tree)}
        wanted = {_path(path): leaf for path, leaf in _leaves(abstract)}
        wrong = []
        for name in sorted(stored | wanted, key=lambda n: (not n.startswith("params."), n)):
            have, want = _describe(stored.get(name)), _describe(wanted.get(name))
            if have != want:
                wrong.append(f"{name} is {have}, the configuration needs {want}")
        if wrong:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} does not fit: {'; '.join(wrong[:6])}"
                + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
                + ". Restore the configuration it was trained with, or use another workdir"
            )

    def close(self) -> None:
        """Waits for pending work and releases the folder."""
        self._manager.close()


def _leaves(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _path(path: tuple) -> str:
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return ".".join(str(key) for key in keys)


def _describe(leaf: Any) -> str:
    if leaf is None:
        return "absent"
    return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"
