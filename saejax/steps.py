"""The step folders of a run: which are whole, which one is next, and what becomes of the others.

    <step>                  a whole checkpoint: it got this name when all of it was on disk
    <step>.saving           being written, or left by a process that was killed: cleared at a start
    <step>.removing         being deleted, likewise
    <step>.damaged-<n>      found to be damaged: never read, never deleted
    <step>.undone-<n>       after a step that training was rolled back to: likewise

Only one process changes them. A step is renamed before anything in it is deleted, so that no kill
leaves a part of a checkpoint under the name of a whole one.
"""

import logging
import pathlib
import re
import shutil

from saejax.digests import flush_folder

_LOG = logging.getLogger(__name__)
_LEFT = re.compile(r"\d+\.(saving|removing)")
_ASIDE = re.compile(r"(\d+)\.(damaged|undone)-\d+")


class StepFolders:
    """The folders in one directory."""

    def __init__(self, directory: pathlib.Path):
        """Names the directory; creates nothing."""
        self.directory = directory

    def path(self, step: int) -> pathlib.Path:
        """The folder of a whole checkpoint."""
        return self.directory / str(step)

    def saving(self, step: int) -> pathlib.Path:
        """The folder of a checkpoint that is being written."""
        return self.directory / f"{step}.saving"

    def whole(self) -> list[int]:
        """Steps that were finished, in order; none if there is no directory."""
        return sorted(int(n) for n in self._names() if n.isdigit())

    def damaged(self) -> list[str]:
        """Names of the folders that were set aside as damaged."""
        return sorted(n for n in self._names() if (m := _ASIDE.fullmatch(n)) and m[2] == "damaged")

    def _names(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        return [entry.name for entry in self.directory.iterdir() if entry.is_dir()]

    def clear(self) -> None:
        """Deletes what a killed save or a killed deletion has left."""
        for name in self._names():
            if _LEFT.fullmatch(name):
                _delete(self.directory / name)

    def begin(self, step: int) -> pathlib.Path:
        """Makes the folder that a checkpoint is written in.

        Raises:
          FileExistsError: that step, or a later one, is there already.
        """
        whole = self.whole()
        if whole and whole[-1] >= step:
            raise FileExistsError(f"the newest step in {self.directory} is {whole[-1]}")
        self.clear()
        folder = self.saving(step)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int) -> None:
        """Gives a checkpoint its final name, in one move, once all of it is on disk."""
        for folder in [self.saving(step), *(p for p in self.saving(step).rglob("*") if p.is_dir())]:
            flush_folder(folder)
        self.saving(step).rename(self.path(step))
        flush_folder(self.directory)

    def set_aside(self, step: int, word: str) -> pathlib.Path:
        """Renames a step to `<step>.<word>-<n>`, the first such name that is free."""
        numbers = (f"{step}.{word}-{n}" for n in range(1, 10**6))
        target = next(t for name in numbers if not (t := self.directory / name).exists())
        return self.path(step).rename(target)

    def prune(self, keep: int | None, keep_every: int | None) -> None:
        """Deletes whole steps but for the newest `keep` and those that `keep_every` selects."""
        if keep is None:
            return
        whole = self.whole()
        for step in set(whole[:-keep]) - selected(whole, keep_every):
            _delete(self.path(step).rename(self.directory / f"{step}.removing"))

    def require_space(self, state_bytes: int, keep: int | None, keep_every: int | None) -> None:
        """Raises OSError unless the disk has room for `keep` states and one in the making.

        States that `keep_every` selects stay for good and free nothing for others.
        """
        whole = self.whole()
        replaced = len(set(whole) - selected(whole, keep_every))
        # The newest may not be deleted before its successor is whole: always room for one.
        wanted = max((keep or 1) + 1 - replaced, 1)
        free = shutil.disk_usage(_nearest(self.directory.absolute())).free
        if free < wanted * state_bytes:
            raise OSError(
                f"{self.directory} has {free:,} bytes free, but {wanted} more checkpoints of "
                f"{state_bytes:,} bytes need {wanted * state_bytes:,} (Checkpoint.keep and one in "
                f"the making); free space, give another --workdir or lower Checkpoint.keep"
            )


def _delete(folder: pathlib.Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # another process reads it, say: no fault of what is being saved
        _LOG.warning("%s cannot be deleted yet (%s); the next save tries again", folder, error)


def selected(whole: list[int], every: int | None) -> set[int]:
    """The first step at or after each multiple of `every`."""
    found: set[int] = set()
    last = 0
    for step in whole if every else ():
        if step // every > last // every:
            found.add(step)
            last = step
    return found


def _nearest(path: pathlib.Path) -> pathlib.Path:
    return next(p for p in (path, *path.parents) if p.exists())
