"""The walls and sizes of the house: who may import what, how large things may be, what is packaged.

Imports are read from the syntax tree, those inside functions too, so nothing is executed.
"""

import ast
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    f for top in ("saejax", "pallas_kernels", "launch") for f in (ROOT / top).rglob("*.py")
)
MODULES = [f.relative_to(ROOT).as_posix() for f in SOURCES]

# A library -> the only files or folders that may import it.
LIBRARIES = {
    "gin": ("saejax/config.py",),
    "orbax": ("saejax/checkpoint.py",),
    "tensorstore": ("saejax/data/shards.py",),
    "flax": ("saejax/model/", "saejax/train/state.py", "saejax/subjects/"),
    "matplotlib": ("saejax/viewer/figures.py",),
    # collectives.py lies below the model, so it cannot go through the model's door.
    "pallas_kernels": ("pallas_kernels/", "saejax/model/sparse.py", "saejax/collectives.py"),
}

# A part of saejax -> the parts below it, which it may import. A part may import itself.
LOW = {"types", "mesh", "capacity", "collectives"}
BELOW_EVALS = LOW | {"model", "train", "data", "subjects", "checkpoint"}
MEASURING = BELOW_EVALS | {"evals", "latents", "interop", "viewer"}
STAGES = {
    "fit",
    "loading",
    "plan",
    "recipe",
    "rundir",
    "sources",
    "wishes",
}  # what run and the notebook interface are made of
PARTS = {
    "schema": set(),
    "bindings": {"schema"},
    "types": set(),
    "capacity": set(),
    "exits": set(),
    "watchdog": {"exits"},
    "processes": {"exits", "watchdog"},
    "rollback": LOW | {"model", "train", "processes"},
    "allocator": set(),
    "mesh": {"types"},
    "collectives": {"types", "mesh"},
    "model": LOW,
    "train": LOW | {"model"},
    "data": {"types", "mesh"},
    "subjects": {"types", "mesh", "data"},
    "digests": {"mesh"},
    "steps": {"digests"},
    "peers": {"digests"},
    "checkpoint": LOW | {"model", "train", "digests", "steps", "peers"},
    "wishes": {"mesh", "data", "checkpoint"},
    "loading": LOW | {"model", "train", "checkpoint"},
    "provenance": LOW | {"model", "train", "recipe", "digests", "processes", "rundir", "schema"},
    "evals": BELOW_EVALS,
    "latents": BELOW_EVALS | {"evals"},
    "interop": BELOW_EVALS,
    "viewer": BELOW_EVALS | {"evals", "latents"},
    "rundir": {"schema"},
    "recipe": LOW | {"model", "train", "checkpoint"},
    "plan": LOW | {"model", "train", "recipe"},
    "fit": LOW
    | {"data", "model", "train", "checkpoint", "recipe", "plan", "processes"}
    | {"loading", "provenance", "rollback", "watchdog", "wishes"},
    "sources": BELOW_EVALS | {"evals", "latents", "watchdog"},
    "run": MEASURING | STAGES | {"exits", "processes", "watchdog"},
    "store_bench": LOW | {"data", "model", "train", "subjects", "recipe", "fit", "allocator"},
    "harvest_run": {"data", "subjects", "rundir", "exits", "processes", "watchdog"},
    "api": MEASURING | STAGES | {"run", "processes"},
    "lockstep": {"data"},
    "several": MEASURING | STAGES | {"exits", "lockstep", "processes", "run", "watchdog"},
    "orders": {"checkpoint", "data", "evals", "fit", "model", "recipe", "sources"}
    | {"subjects", "train"},
    "importing": {"data", "subjects"},
    "stores": {"data", "subjects", "importing"},
    "truncation": {"data", "evals", "loading", "rundir", "sources"},
    "verify": {"checkpoint", "data", "rundir", "steps"},
    "messages": set(),
    "config": {"schema", "bindings"},
    "ending": {"exits", "messages", "processes"},
    "main": {"allocator", "config", "ending", "plan", "processes", "verify", "watchdog"},
    "__init__": {"api", "train"},
}

COLLECTIVES = {
    "all_gather", "all_gather_invariant", "all_gather_reduced", "all_to_all", "pbroadcast", "pmax",
    "pmean", "pmin", "ppermute", "pshuffle", "psum", "psum_scatter", "pswapaxes",
    "ragged_all_to_all",
}  # fmt: skip
# Benchmarks compare with the whole library and its peers, and load both when asked to.
BENCH = "pallas_kernels/bench/"
IMPORTED_BENCH = "pallas_kernels.bench"
DEPRECATED = {"jax.experimental.pjit", "jax.experimental.shard_map", "jax.experimental.maps"}


def imports(module: str, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, `from a import b` as a.b, relative ones resolved.

    Those inside functions too, unless only those at the top of the file are asked for.
    """
    package = module.removesuffix(".py").split("/")[:-1]
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str:
    return module.removesuffix(".py").split("/")[1]


def test_the_walk_sees_the_house():
    assert "saejax/config.py" in MODULES and "saejax/main.py" in MODULES
    assert "gin" in set(imports("saejax/config.py"))
    assert "saejax.bindings.Plan" in set(imports("saejax/config.py"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_stays_behind_its_door(library):
    doors = LIBRARIES[library]
    strays = [m for m in MODULES if library in {i.split(".")[0] for i in imports(m)}]
    assert [m for m in strays if not m.startswith(doors)] == []


def test_kernels_import_jax_and_numpy_only():
    allowed = {"jax", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
    strays = [
        (module, name)
        for module in MODULES
        if module.startswith("pallas_kernels/") and not module.startswith(BENCH)
        for name in imports(module)
        if name.split(".")[0] not in allowed
    ]
    assert strays == []


def test_benchmarks_load_what_they_compare_when_asked_to():
    allowed = {"jax", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
    benches = [module for module in MODULES if module.startswith(BENCH)]
    strays = [(m, name) for m in benches for name in imports(m, top_only=True)]
    assert benches and [s for s in strays if s[1].split(".")[0] not in allowed] == []
    users = {m for m in MODULES if any(i.startswith(IMPORTED_BENCH) for i in imports(m))}
    assert [m for m in users if not m.startswith(BENCH)] == []


def test_imports_run_one_way():
    strays = []
    for module in MODULES:
        if module.startswith("saejax/"):
            allowed = PARTS[part_of(module)] | {part_of(module)}
            used = {i.split(".")[1] for i in imports(module) if i.startswith("saejax.")}
            strays += [(module, part) for part in used & set(PARTS) if part not in allowed]
    assert strays == []


def test_the_order_of_the_parts_has_no_circle():
    left = {part: set(below) for part, below in PARTS.items()}
    while left:
        free = [part for part, below in left.items() if not below & set(left)]
        assert free, f"circle among {sorted(left)}"
        for part in free:
            del left[part]


def test_every_part_is_known():
    parts = {part_of(m) for m in MODULES if m.startswith("saejax/")}
    assert parts - set(PARTS) == set(), "add it to PARTS with what it may import"


def test_launch_imports_no_jax():
    strays = [m for m in MODULES if m.startswith("launch/") and "jax" in set(imports(m))]
    assert strays == []


def test_partition_specs_are_written_in_the_mesh_only():
    strays = []
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in ("P", "PartitionSpec"):
                    strays.append(f"{module}:{node.lineno}")
    assert [s for s in strays if not s.startswith("saejax/mesh.py")] == []


def test_collectives_live_in_one_file():
    strays = []
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
            named = isinstance(node, ast.Attribute) and node.attr in COLLECTIVES
            of_lax = named and ast.unparse(node.value) in ("lax", "jax.lax")
            if of_lax:
                strays.append(f"{module}:{node.lineno}")
        names = {i.rpartition(".")[2] for i in imports(module) if i.startswith("jax.lax.")}
        strays += [f"{module} imports {name}" for name in names & COLLECTIVES]
    assert [s for s in strays if not s.startswith("saejax/collectives.py")] == []


def test_no_deprecated_sharding():
    strays = [(m, i) for m in MODULES for i in imports(m) for d in DEPRECATED if i.startswith(d)]
    assert strays == []


def test_sizes():
    large = []
    for module in MODULES:
        text = (ROOT / module).read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > (600 if "/mosaic_" in module else 400):
            large.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    large.append(f"{module}:{node.lineno} {node.name}: {length} lines")
    assert large == []
    assert len((ROOT / "saejax/main.py").read_text().splitlines()) < 80


def test_no_rooms_for_odds_and_ends():
    names = {"utils.py", "common.py", "helpers.py", "util.py", "misc.py"}
    assert [m for m in MODULES if Path(m).name in names] == []


def test_the_gin_folder_holds_no_python():
    assert list((ROOT / "gin").rglob("*.py")) == []


def test_every_file_compiles_without_a_warning():
    ours = ("saejax", "pallas_kernels", "launch", "tests")
    files = [ROOT / "setup.py", *(f for name in ours for f in (ROOT / name).rglob("*.py"))]
    assert len(files) > 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in files:
            compile(file.read_bytes(), str(file), "exec")


def setup_constant(name: str):
    """A literal of setup.py, read without setuptools."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def test_every_package_is_named_in_setup():
    tops = ("saejax", "pallas_kernels", "launch")
    inits = (f for top in tops for f in (ROOT / top).rglob("__init__.py"))
    found = {".".join(f.parent.relative_to(ROOT).parts) for f in inits}
    assert set(setup_constant("PACKAGES")) == found | {"saejax.gin"}
    missing = {Path(m).parent for m in MODULES if m.split("/")[0] in tops}
    assert {".".join(p.parts) for p in missing} == found, "a folder of code without __init__.py"


def test_every_data_file_is_packaged():
    folders = setup_constant("PACKAGE_DIR")
    packaged = {
        file
        for package, patterns in setup_constant("PACKAGE_DATA").items()
        for pattern in patterns
        for file in (ROOT / folders.get(package, package.replace(".", "/"))).glob(pattern)
    }
    present = {f for top in ("saejax", "gin") for f in (ROOT / top).rglob("*") if f.is_file()}
    data = {f for f in present if f.suffix not in (".py", ".pyc")}
    assert sorted(map(str, data - packaged)) == []


IMPORT_ALL = """
import importlib, pkgutil, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"import uses the network: {event} {args}")
sys.addaudithook(refuse)
for top in ("saejax", "pallas_kernels"):
    package = importlib.import_module(top)
    for module in pkgutil.walk_packages(package.__path__, f"{top}."):
        importlib.import_module(module.name)
print("jax" in sys.modules)
"""


def python(code: str, cwd: Path, **env: str) -> str:
    """Runs code in a fresh interpreter whose own writes can only go to cwd's neighbours."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_touches_no_device_file_or_network(tmp_path):
    (tmp_path / "cwd").mkdir()
    # A platform that does not exist: whoever asks JAX for a device at import fails here.
    out = python(IMPORT_ALL, tmp_path / "cwd", JAX_PLATFORMS="nowhere", MPLCONFIGDIR=str(tmp_path))
    assert out == "True\n"
    assert list((tmp_path / "cwd").iterdir()) == []


def test_the_command_line_answers_without_jax(tmp_path):
    code = "import sys, saejax.main, saejax.config; print('jax' in sys.modules)"
    assert python(code, tmp_path) == "False\n"
