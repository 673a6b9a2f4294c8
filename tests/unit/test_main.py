"""The command line: exit codes, one-line errors, and every shipped gin file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saejax import config

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = config.shipped_files()

# A real run of main.py on a table of one small experiment: only what the run does is replaced.
TINY = '''
import dataclasses, json, logging, sys
from pathlib import Path
from typing import Literal
from saejax import config, main, schema

@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment that ends as it is told."""

    end: Literal["well", "stopped", "value", "file", "disk", "library", "bug"] = "well"

    def plan(self, topology=None):
        return "the plan"

    def run(self, workdir, operative_gin, config_json, argv):
        logging.getLogger("jax.elsewhere").info("chatter")
        logging.getLogger("saejax.elsewhere").info("progress")
        print(json.dumps([str(workdir), operative_gin, config_json, argv[1:]]))
        if self.end == "value":
            schema.literal(float("nan"))
        if self.end == "file":
            raise FileNotFoundError("no weights at 'x'")
        if self.end == "disk":
            Path("missing/x").write_text("")
        if self.end == "library":
            raise ValueError("raised\\n  by a library")
        if self.end == "bug":
            {}["key"]
        return {"stopped": 42}.get(self.end, 0)

Experiment.__module__ = "tiny"
sys.modules["tiny"] = sys.modules["__main__"]
config.CONFIGURABLES.clear()
config.CONFIGURABLES["Experiment"] = "tiny:Experiment"
main.console()
'''


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def saejax(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    return python("-m", "saejax.main", *flags, cwd=cwd)


@pytest.fixture
def tiny(tmp_path):
    """Runs the command with the small experiment ending in the given way."""
    (tmp_path / "my.gin").write_text("Experiment.end = 'well'\n")

    def run(end: str, *flags: str) -> subprocess.CompletedProcess:
        binding = f"--gin_bindings=Experiment.end='{end}'"
        return python("-c", TINY, "--gin_file=my.gin", binding, *flags, cwd=tmp_path)

    return run


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 1, done.stderr
    stderr = done.stderr.removeprefix("progress\n")
    assert stderr.startswith("saejax: error: ") and stderr.count("\n") == 1, done.stderr
    assert [w for w in words if w not in done.stderr] == [], done.stderr


def test_a_run_gets_its_workdir_configuration_and_arguments(tiny):
    done = tiny("well")
    assert done.returncode == 0, done.stderr
    workdir, operative, as_json, argv = json.loads(done.stdout)
    assert workdir == "runs/my"
    assert operative == "# Experiment\nExperiment.end = 'well'\n"
    assert as_json == {"class": "Experiment", "end": "well"}
    assert argv == ["--gin_file=my.gin", "--gin_bindings=Experiment.end='well'"]
    assert json.loads(tiny("well", "--workdir=a/b").stdout)[0] == "a/b"


def test_progress_is_plain_and_libraries_are_quiet(tiny):
    assert tiny("well").stderr == "progress\n"
    assert "chatter" in tiny("well", "--debug").stderr


def test_exit_code_of_a_stopped_run(tiny):
    assert tiny("stopped").returncode == 42


def test_user_errors_are_one_line(tiny):
    assert_one_line(tiny("value"), "error: nan cannot be written", "use None or a number\n")
    assert_one_line(tiny("file"), "no weights at 'x'")
    assert_one_line(tiny("disk"), "No such file or directory: 'missing/x'\n")
    assert_one_line(tiny("nonsense"), "Experiment.end", "'nonsense'", "'well' or 'stopped'")


def test_a_librarys_error_points_to_debug(tiny):
    assert_one_line(tiny("library"), "error: raised by a library (--debug shows where)\n")


def test_debug_and_bugs_keep_their_traceback(tiny):
    shown = tiny("value", "--debug")
    assert shown.returncode == 1 and "Traceback" in shown.stderr
    bug = tiny("bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "KeyError" in bug.stderr


def test_dry_run_prints_and_does_not_run(tiny, tmp_path):
    done = tiny("value", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "# Experiment\nExperiment.end = 'value'\n\nthe plan\n"
    assert [f.name for f in tmp_path.iterdir()] == ["my.gin"]


def test_mistakes_on_the_command_line(tmp_path):
    assert_one_line(saejax(cwd=tmp_path), "--gin_file is missing", *SHIPPED)
    assert_one_line(saejax("gin/quickstart.gin", cwd=tmp_path), "--gin_file=gin/quickstart.gin")
    missing = saejax("--gin_file=gin/quikstart.gin", cwd=tmp_path)
    assert_one_line(missing, "'gin/quikstart.gin'", "Did you mean gin/quickstart.gin?")
    (tmp_path / "bad.gin").write_text("SAE.k = 3\nSEA.k = 4\n")
    assert_one_line(saejax("--gin_file=bad.gin", cwd=tmp_path), "bad.gin:2", "Did you mean SAE?")
    unknown = saejax("--gin_fil=x", cwd=tmp_path)
    assert unknown.returncode == 1 and "gin_file" in unknown.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["bad.gin"]


def test_list_configurables(tmp_path):
    done = saejax("--list_configurables", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in config.CONFIGURABLES:
        assert f"\n\n{name}: " in f"\n\n{done.stdout}"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_builds_plans_and_survives_its_operative_text(name, tmp_path):
    experiment, operative, as_json = config.load_experiment([name])
    assert experiment.plan()
    (tmp_path / "operative.gin").write_text(operative, encoding="utf-8")
    again = config.load_experiment([str(tmp_path / "operative.gin")])
    assert again == (experiment, operative, as_json)
    assert json.loads(json.dumps(as_json)) == as_json


def test_the_promised_files_are_shipped():
    promised = {"quickstart", "gpt2_small_32k", "gpt2_small_128k", "gpt4_16m"}
    assert {f"gin/{name}.gin" for name in promised} <= set(SHIPPED)
