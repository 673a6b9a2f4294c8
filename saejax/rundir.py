"""The run directory: what lies where, and the refusal to mix two runs in one."""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from saejax.schema import config_differences

_PACKAGES = ("saejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")


class RunDirectory:
    """Paths of one run.

    config.gin, config.json    the operative configuration
    run.json                   versions, platform, and argv of every start
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

    def claim(self, config_json: Mapping[str, Any], operative_gin: str, argv: Sequence[str]):
        """Takes the folder for this configuration, or joins the run of the same one in it.

        Raises:
          ValueError: the folder holds a run of another configuration, or files of something else.
          OSError: the folder cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = sorted(entry.name for entry in self.path.iterdir())
            if self.config_json.exists():
                self._refuse_other_run(json.loads(self.config_json.read_text()), config_json)
            elif present:
                raise ValueError(
                    f"workdir = {self.path} is not empty ({', '.join(present[:4])}, ...) and holds "
                    f"no run; give an empty or new --workdir"
                )
            write_text(self.config_gin, operative_gin)
            write_json(self.config_json, config_json)
            self._log_start(argv)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise type(error)(
                f"workdir = {self.path} cannot be written ({error.strerror or error}); "
                f"give a --workdir you may write to"
            ) from error
        except OSError as error:
            raise OSError(
                f"workdir = {self.path} cannot be written ({error.strerror or error}); "
                f"give a --workdir you may write to"
            ) from error

    def _refuse_other_run(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = config_differences(old, new)
        if changed:
            shown = "; ".join(changed[:8]) + ("; ..." if len(changed) > 8 else "")
            raise ValueError(
                f"workdir = {self.path} holds a run of another configuration ({shown}); restore "
                f"these bindings to continue it, or give another --workdir"
            )

    def _log_start(self, argv: Sequence[str]) -> None:
        starts = []
        if self.run_json.exists():
            starts = json.loads(self.run_json.read_text())["starts"]
        starts.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "argv": list(argv)})
        versions = {name: importlib.metadata.version(name) for name in _installed(_PACKAGES)}
        content = {
            "versions": versions,
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "starts": starts,
        }
        write_json(self.run_json, content)


def _installed(names: Sequence[str]) -> list[str]:
    # A checkout on the path need not be installed; its dependencies always are.
    known = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    return [name for name in names if name in known]


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
