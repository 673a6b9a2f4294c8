"""The README's promises: its blocks are complete, its snippets run, its links and files exist."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saejax import config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
BASH = [text for language, text in BLOCKS if language == "bash"]
PYTHON = [text for language, text in BLOCKS if language == "python"]
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


def test_every_block_is_closed():
    fences = re.findall(r"^```", README, re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS)


# --- The two commands -----------------------------------------------------------------------------


def test_the_first_two_bash_blocks_are_complete():
    """The main job and the tests, each from nothing: an environment, an install, the command."""
    job, tests = BASH[:2]
    assert "saejax.main --gin_file=gin/quickstart.gin" in job and "--gin_bindings" not in job
    assert re.search(r"pytest\b", tests)
    for block in (job, tests):
        assert re.search(r"^python3 -m venv \S+$", block, re.MULTILINE), block
        made, used = re.search(r"venv (\S+)$", block, re.MULTILINE)[1], block
        assert f". {made}/bin/activate" in used or f"{made}/bin/python" in used
        assert re.search(r"pip install\b", block), block
        assert "/tmp" not in block and "sudo" not in block and "git clone" not in block
    # One environment each: neither block needs the other to have run.
    environments = [re.search(r"venv (\S+)$", block, re.MULTILINE)[1] for block in (job, tests)]
    assert len(set(environments)) == 2


@pytest.mark.parametrize("block", BASH, ids=[f"bash {i}" for i in range(len(BASH))])
def test_bash_is_bash(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def commands() -> list[str]:
    """Every call of our own command line in any block, comments and line ends joined away."""
    text = "\n".join(block for language, block in BLOCKS if language != "python")
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"^\S*(?:python3? -m saejax\.main|saejax) (--.*?)(?:\s+#.*)?$", text, re.M)
    return [command.strip() for command in found]


def test_commands_are_found():
    assert any("gin/quickstart.gin" in command for command in commands())


@pytest.mark.parametrize("command", commands())
def test_commands_parse_and_build(command):
    """Files are found, bindings are right: all that happens before compilation."""
    files = re.findall(r"--gin_file=(\S+)", command)
    bindings = [
        b or c for b, c in re.findall(r"--gin_bindings=(?:\"([^\"]*)\"|'([^']*)')", command)
    ]
    known = {"gin_file", "gin_bindings", "workdir", "dry_run", "list_configurables", "debug"} | {
        "verify",
        "allow_config_change",
        "topology",
    }
    assert set(re.findall(r"--(\w+)", command)) <= known
    if not {"--list_configurables", "--verify"} & set(command.split()):
        topology = re.search(r"--topology=(\S+)", command)
        plan = config.load_experiment(files, bindings)[0].plan
        assert plan(topology[1] if topology else None)


# --- The snippets ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(small_run, tmp_path_factory):
    """A directory that has `runs/quickstart`, as after the first block."""
    folder = tmp_path_factory.mktemp("readme") / "home"
    shutil.copytree(small_run.home, folder)
    return folder


def test_the_python_snippets_run_in_order(home):
    """As one program in a new Python, as a reader would paste them."""
    assert len(PYTHON) >= 3, "load, encode and decode, train"
    text = "\n".join(PYTHON)
    assert all(name in text for name in ("saejax.load(", ".encode(", ".decode(", "saejax.train("))
    (home / "snippets.py").write_text(text, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "snippets.py"]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


# --- Files and links ------------------------------------------------------------------------------


def test_every_relative_link_and_picture_exists():
    targets = re.findall(r"\]\(([^)\s]+)\)", PROSE) + re.findall(r'(?:src|href)="([^"]+)"', PROSE)
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    assert any(t.endswith((".png", ".svg")) for t in local), "one picture made by the quickstart"
    files = [t.partition("#")[0] for t in local]
    assert [f for f in files if f and not (ROOT / f).exists()] == []
    headings = re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    assert [t for t in local if t.startswith("#") and t[1:] not in anchors] == []


def test_every_file_it_names_exists():
    named = re.findall(r"`((?:saejax|pallas_kernels|gin|tests|launch|docs)/[\w./-]*)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_gin_file_is_named():
    assert [name for name in config.shipped_files() if name not in README] == []


def test_the_run_directory_is_as_drawn(small_run):
    """The drawing of `runs/quickstart/` names what a run really has, and all of it."""
    (drawing,) = [text for _, text in BLOCKS if text.startswith("runs/quickstart/\n")]
    drawn = set()
    for line in drawing.splitlines()[1:]:
        drawn |= set(re.match(r"  (\S.*?)(?:   |$)", line)[1].split())
        drawn |= set(re.findall(r"\b(tensorboard)/", line))
    drawn = {name.partition("/")[0] for name in drawn}
    assert drawn == {path.name for path in small_run.path.iterdir()}


def test_it_names_the_python_and_the_figures_that_must_hold():
    assert "Python >= 3.11" in README
    for word in ("NMSE", "delta CE", "dead", "MMCS"):
        assert word in README, word
    assert re.search(r"^#+ .*limit", README, re.MULTILINE | re.IGNORECASE)
    assert "@@" not in README and "TODO" not in README
