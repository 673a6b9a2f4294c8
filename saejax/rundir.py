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

from saejax import __version__
from saejax.schema import config_differences

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")


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

        A start that failed before it made anything (a misspelt path, say) claims nothing: the
        corrected configuration may take its place.

        Raises:
          ValueError: the folder holds a run of another configuration, or files of something else.
          OSError: the folder cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = sorted(entry.name for entry in self.path.iterdir())
            ours = (self.config_gin, self.config_json, self.run_json)
            claimed = {path.name + end for path in ours for end in ("", ".partial")}
            # A claim writes config.gin first: a lone config.json is another program's.
            begun = not present or self.config_gin.name in present[0]
            if not (begun and set(present) <= claimed):
                if not self.config_json.exists():
                    more = ", ..." if len(present) > 4 else ""
                    raise ValueError(
                        f"workdir = {self.path} is not empty ({', '.join(present[:4])}{more}) and "
                        f"holds no run; give an empty or new --workdir"
                    )
                self._refuse_other_run(config_json)
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

    def require_claim(self, seconds: float = 30) -> None:
        """Waits until the claim that another process made of the folder can be seen here.

        Raises:
          FileNotFoundError: it cannot; the processes do not share the file system.
        """
        deadline = time.monotonic() + seconds
        while not self.run_json.exists():
            if time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"workdir = {self.path.absolute()} was made by process 0 and is not seen on "
                    f"{platform.node()}; give a --workdir on a file system that all processes share"
                )
            time.sleep(0.1)

    def _refuse_other_run(self, new: Mapping[str, Any]) -> None:
        changed = config_differences(read_object(self.config_json), new)
        if changed:
            shown = "; ".join(changed[:8]) + ("; ..." if len(changed) > 8 else "")
            raise ValueError(
                f"workdir = {self.path} holds a run of another configuration ({shown}); restore "
                f"these bindings to continue it, or give another --workdir"
            )

    def _log_start(self, argv: Sequence[str]) -> None:
        starts = []
        if self.run_json.exists():
            starts = read_object(self.run_json).get("starts", [])
        starts.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "argv": list(argv)})
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        content = {
            "versions": {"saejax": __version__, **versions},  # a checkout need not be installed
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "starts": starts,
        }
        write_json(self.run_json, content)


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
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
