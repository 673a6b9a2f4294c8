"""The run directory: what lies where, and the refusal to mix two runs in one."""

import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from saejax import __version__
from saejax.schema import config_differences

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
_LOG = logging.getLogger(__name__)
_NO_RESULT = ("allow_other_computation", "checkpoint", "kernels", "watchdog")
_PARTIAL = re.compile(r"(\.[0-9a-f]{8})?\.partial$")


class RunDirectory:
    """Paths of one run.

    config.gin, config.json    the operative configuration
    run.json                   versions, platform; argv and a random token of every start
    activations/               the activation store
    checkpoints/<step>/        training states
    metrics.jsonl, tensorboard/
    evaluation.json, report.html, figures/
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Names the folder; creates nothing."""
        self.path = pathlib.Path(path)
        self.config_gin = self.path / "config.gin"
        self.config_json = self.path / "config.json"
        self.run_json = self.path / "run.json"
        self.activations = self.path / "activations"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.json"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"
        self._replaced: dict[pathlib.Path, str] = {}

    def claim(
        self,
        config_json: Mapping[str, Any],
        operative_gin: str,
        argv: Sequence[str],
        *,
        allow_change: bool = False,
    ) -> str:
        """Takes the folder for this configuration, or joins the run of the same one in it.

        A start that failed before it made anything (a misspelt path, say) claims nothing: the
        corrected configuration may take its place.

        Args:
          config_json: the configuration; decides whether a run is the same.
          operative_gin: the same as gin text, kept in the folder.
          argv: the command line, kept in the folder.
          allow_change: take over a run of another configuration: what changed is logged, and kept
            in run.json.

        Returns:
          The token of this start, for `require_claim` in the other processes.

        Raises:
          ValueError: the folder holds a run of another configuration, or files of something else.
          OSError: the folder cannot be created or written.
        """
        config_json, changed = json.loads(json.dumps(config_json)), []  # lists for tuples
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = sorted(entry.name for entry in self.path.iterdir())
            ours = (self.config_gin, self.config_json, self.run_json)
            claimed = {path.name for path in ours}
            # A claim writes config.gin first: a lone config.json is another program's.
            begun = not present or self.config_gin.name in present[0]
            if not (begun and {_PARTIAL.sub("", name) for name in present} <= claimed):
                if not self.config_json.exists():
                    more = ", ..." if len(present) > 4 else ""
                    raise ValueError(
                        f"workdir = {self.path} is not empty ({', '.join(present[:4])}{more}) and "
                        f"holds no run; give an empty or new --workdir"
                    )
                changed = self._changes(config_json, allow_change)
            if changed:
                kept = [path for path in (self.config_gin, self.config_json) if path.exists()]
                self._replaced = {path: path.read_text(encoding="utf-8") for path in kept}
            write_text(self.config_gin, operative_gin)
            write_json(self.config_json, config_json)
            return self._log_start(argv, changed)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise type(error)(
                f"workdir = {self.path} cannot be written ({error.strerror or error}); "
                f"give a --workdir you may write to"
            ) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "free some, and run again" if full else "give a --workdir you may write to"
            raise OSError(
                f"workdir = {self.path} cannot be written ({error.strerror or error}); {fix}"
            ) from error

    @contextlib.contextmanager
    def change_accepted(self) -> Iterator[None]:
        """Puts the configuration back that a claim replaced, if what is inside refuses it.

        That is a ValueError or OSError before there is any checkpoint of the new one.
        """
        before = self._checkpoint_names()
        try:
            yield
        except (ValueError, OSError):
            if self._checkpoint_names() == before:
                for path, text in self._replaced.items():
                    write_text(path, text)
            raise

    def _checkpoint_names(self) -> set[str]:
        folder = self.checkpoints
        return {p.name for p in folder.iterdir()} if folder.is_dir() else set()

    def require_claim(self, token: str, who: str, seconds: float = 20) -> None:
        """Waits until the claim that process 0 has just made can be seen in this folder.

        A run.json alone proves nothing: a folder of this machine may hold one of an earlier run.

        Args:
          token: what `claim` returned in process 0.
          who: this process, for the message.
          seconds: how long to wait, since a shared file system may lag.

        Raises:
          FileNotFoundError: it cannot; this process sees another folder than process 0.
        """
        deadline = time.monotonic() + seconds
        while not self._shows(token):
            if time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"workdir = {self.path.absolute()} of {who} on {platform.node()} is not the "
                    f"folder that process 0 claimed; give all processes the same --workdir, on a "
                    f"file system that they share"
                )
            time.sleep(0.1)

    def _shows(self, token: str) -> bool:
        try:
            return token in self.run_json.read_text(encoding="utf-8")
        except (OSError, ValueError):  # not there yet, or of something else
            return False

    def _changes(self, new: Mapping[str, Any], allow: bool) -> list[str]:
        """What differs from the run that the folder holds, if that is allowed."""
        changed = config_differences(result_of(read_object(self.config_json)), result_of(new))
        if changed and not allow:
            shown = "; ".join(changed[:8]) + ("; ..." if len(changed) > 8 else "")
            raise ValueError(
                f"workdir = {self.path} holds a run of another configuration ({shown}); restore "
                f"these bindings to continue it, give another --workdir, or go on with the change "
                f"with --allow_config_change"
            )
        for line in changed:
            _LOG.warning("changed in this run, as --allow_config_change says: %s", line)
        return changed

    def _log_start(self, argv: Sequence[str], changed: Sequence[str]) -> str:
        starts, token = [], secrets.token_hex(8)
        if self.run_json.exists():
            starts = read_object(self.run_json).get("starts", [])
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        starts.append({"time": now, "argv": list(argv), "token": token})
        if changed:
            starts[-1]["changed"] = list(changed)
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        content = {
            "versions": {"saejax": __version__, **versions},  # a checkout need not be installed
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "starts": starts,
        }
        write_json(self.run_json, content)
        return token


def result_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's result: not how it is computed, which may change with the machine."""
    return {
        part: result_of(value) if isinstance(value, Mapping) else value
        for part, value in config.items()
        if part not in _NO_RESULT
    }


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file when it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or not of this program ({error}); restore it, or give another "
            f"--workdir"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; restore it, or give another --workdir")
    return content


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all; OSError names it."""
    # Of a name of its own: several processes may start a harvest in one folder at once.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise OSError(error.errno, reason, str(path)) from error  # not the partial's name


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
