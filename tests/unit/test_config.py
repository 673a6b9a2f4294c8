"""gin files become checked objects, and every mistake is one message that names its place."""

import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any, Literal

import gin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax import config, schema


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """Where text comes from."""

    source: str = "python"
    percent: float = 5.0
    limit: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Activations from a model.

    More lines that the list does not show.
    """

    site: str
    words: Words = Words()
    order: Literal["random", "sorted"] = "random"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted:
    """Activations from known features."""

    features: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model."""

    width: int
    k: int = 4
    scale: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    ks: tuple[int, ...] = ()
    tied: bool = True

    def __post_init__(self):
        if self.k > self.width:
            raise ValueError(f"k={self.k} must be at most width={self.width}; lower k")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Root:
    """All of a run."""

    model: Model
    data: Files | Planted = Planted()
    probes: tuple[Words, ...] = ()
    seed: int = 0


NAMES = ("Root", "Model", "Files", "Planted", "Words")
TABLE = {name: f"{__name__}:{name}" for name in NAMES}
BASE = "Root.model = @Model()\nModel.width = 64\n"


def load(files, flags=()) -> tuple[Any, str, dict]:
    return config.load_experiment(files, flags, table=TABLE, root="Root")


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """Writes gin files into an empty working directory and returns their names."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.gin") -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def error(files, flags=(), kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        load(files, flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_reach_the_objects(run_file):
    name = run_file(
        BASE
        + "WIDTH = 128  # a macro\n"
        + "Model:\n  k = 8\n  scale = 1\n  ks = (1, 2)\n  tied = False\n"
        + "Files.site = '1.resid_post'\nFiles.words = @held/Words()\nRoot.data = @Files()\n"
        + "held/Words.limit = %WIDTH\nWords.percent = 2\n"
    )
    root, _, _ = load([name], ["Model.width = 32", "Root.seed = 3"])
    assert root == Root(
        model=Model(width=32, k=8, scale=1.0, ks=(1, 2), tied=False),
        data=Files(site="1.resid_post", words=Words(limit=128, percent=2.0)),
        seed=3,
    )
    assert type(root) is Root and type(root.model) is Model
    assert type(root.model.scale) is float and type(root.data.words.percent) is float
    assert pickle.loads(pickle.dumps(root)) == root


def test_direct_calls_stay_free_of_gin_and_loads_do_not_leak(run_file):
    name = run_file(BASE + "Model.k = 8\n")
    first = load([name])[0]
    assert Model(width=64).k == 4
    assert gin.config_str().strip() == ""
    assert load([name], ["Model.k = 9"])[0].model.k == 9
    assert load([name])[0] == first
    assert load([run_file(BASE, "other.gin")])[0].model.k == 4


def test_precedence_include_file_later_file_flag(run_file):
    run_file(BASE + "Model.k = 1\nRoot.seed = 1\nModel.tied = False\n", "gin/base.gin")
    a = run_file("include 'gin/base.gin'\nModel.k = 2\n", "gin/a.gin")
    b = run_file("include 'gin/base.gin'\nModel.k = 3\n", "gin/b.gin")
    assert load([a])[0].model.k == 2
    root = load([a, b])[0]
    assert (root.model.k, root.seed, root.model.tied) == (3, 1, False)
    # The base is read once: for the second file it must not undo what the first one says.
    assert load([b, run_file("include 'gin/base.gin'\n", "gin/c.gin")])[0].model.k == 3
    assert load([a, b], ["Model.k = 4"])[0].model.k == 4


def test_an_include_is_found_beside_the_file_from_anywhere(run_file, tmp_path, monkeypatch):
    run_file(BASE, "kept/gin/base.gin")
    name = run_file("include 'gin/base.gin'\nModel.k = 2\n", "kept/gin/a.gin")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load([str(tmp_path / name)])[0].model.k == 2


def test_scopes_are_inherited_as_in_gin(run_file):
    name = run_file(
        BASE
        + "Root.data = @a/b/Files()\nFiles.site = 's'\nFiles.words = @Words()\n"
        + "Words.source = 'none'\na/Words.percent = 1\na/b/Words.limit = 2\n"
        + "Root.probes = (@Words(), @a/Words())\n"
    )
    root = load([name])[0]
    assert root.data.words == Words(source="none", percent=1.0, limit=2)
    assert root.probes == (Words(source="none"), Words(source="none", percent=1.0))
    assert "x/Words.limit" in error([name], ["x/Words.limit = 3"])
    required = "Root.model = @in/Model()\nModel.width = %gin.REQUIRED\nin/Model.width = 64\n"
    assert load([run_file(required)])[0].model.width == 64


def test_macros_may_hold_references_and_tuples(run_file):
    name = run_file(BASE + "DATA = @Planted()\nK = 3\nBOTH = (%K, 4)\nRoot.data = %DATA\n")
    root = load([name], ["Model.ks = %BOTH"])[0]
    assert root.data == Planted() and root.model.ks == (3, 4)


MISTAKES = {
    # what is wrong: (text after BASE, words that the message must hold)
    "unknown configurable": ("Modle.k = 3", ["run.gin:3", "'Modle'", "Did you mean Model?"]),
    "wrong capitals": ("model.k = 3", ["run.gin:3", "Model", "case-sensitive"]),
    "nothing near": ("Zebra.k = 3", ["'Zebra'", "Root, Model, Files, Planted, Words"]),
    "unknown reference": ("Root.data = @Plantd()", ["run.gin:3", "@Plantd()", "Planted?"]),
    "unknown field": ("Model.widht = 3", ["run.gin:3", "'widht'", "Did you mean width?"]),
    "field of another": ("Model.site = 'a'", ["no field 'site'", "Files has one"]),
    "field of none": ("Words.zzz = 1", ["no field 'zzz'", "source, percent, limit"]),
    "unknown field of an unbuilt class": ("Files.sight = 'a'", ["'sight'", "site"]),
    "never built": ("Planted.features = 3", ["run.gin:3", "never used", "Root.data = @Planted()"]),
    "several never built": (
        "Planted.features = 3\nFiles.site = 'a'",
        ["1 more: Files.site", "no Planted is built"],
    ),
    "scope nobody enters": (
        "Root.data = @train/Planted()\ntrian/Planted.features = 3",
        ["run.gin:4", "'trian'", "Did you mean train?"],
    ),
    "unused macro": ("WIDTH = 3", ["run.gin:3", "macro WIDTH is never used"]),
    "unknown macro": ("D = 3\nModel.k = %DD\nModel.ks = (%D,)", ["run.gin:4", "%DD", "mean D?"]),
    "macro of itself": ("A = %B\nB = %A\nModel.k = %A", ["refers to itself"]),
    "lower-case macro": ("widht = 3", ["run.gin:3", "neither a field nor a macro", "capitals"]),
    "duplicate": ("Model.k = 1\nModel.k = 2", ["run.gin:4", "already at run.gin:3", "Model.k"]),
    "duplicate in a block": ("Model.k = 1\nModel:\n  k = 2", ["run.gin:5", "run.gin:3"]),
    "duplicate macro": ("A = 1\nA = 2\nModel.k = %A", ["run.gin:4", "A was bound already"]),
    "float for int": ("Model.k = 1e2", ["run.gin:3", "100.0", "must be int", "Write 100"]),
    "bool for int": ("Model.k = True", ["Model.k = True must be int"]),
    "string for int": ("Model.k = '3'", ["must be int", "Write 3 without quotes"]),
    "string for float": ("Model.scale = '1e-3'", ["float or None", "Write 1e-3 without quotes"]),
    "bool for float": ("Model.scale = True", ["must be float or None"]),
    "None for int": ("Model.k = None", ["Model.k = None must be int"]),
    "int for bool": ("Model.tied = 1", ["must be bool", "Write True"]),
    "string for bool": ("Model.tied = 'False'", ["must be bool", "Write False without quotes"]),
    "number for string": ("Root.data=@Files()\nFiles.site = 3", ["must be str", "quotes: '3'"]),
    "list for tuple": ("Model.ks = [1, 2]", ["a tuple of int", "Write a tuple: (1, 2)"]),
    "one for a tuple": ("Model.ks = (1)", ["a tuple of int", "(1,)"]),
    "bad item": ("Model.ks = (1, 2.5)", ["Model.ks = (1, 2.5) must be a tuple of int"]),
    "wrong length": ("Model.betas = (0.9, 0.99, 0.999)", ["(float, float)", "3 items and 2"]),
    "literal": (
        "Root.data = @Files()\nFiles.site = 'a'\nFiles.order = 'sort'",
        ["run.gin:5", "'random' or 'sorted'", "Did you mean sorted?"],
    ),
    "class for instance": ("Root.data = @Planted", ["@Files() or @Planted()", "parentheses"]),
    "object of another class": ("Root.data = @Words()", ["must be @Files() or @Planted()"]),
    "object for number": ("Model.k = @Words()", ["Model.k = @Words() must be int"]),
    "string for object": ("Root.data = 'Planted'", ["must be @Files() or @Planted()"]),
    "missing field": ("Root.data = @Files()", ["Files.site must be bound", "--gin_bindings="]),
    "missing in a scope": ("Root.data = @x/Files()", ["x/Files.site must be bound"]),
    "marked as required": ("Model.k = %gin.REQUIRED", ["Model.k must be bound"]),
    "import": ("import os", ["run.gin:3", "`import os` is refused", "include"]),
    "dynamic registration": (
        "from __gin__ import dynamic_registration",
        ["run.gin:3", "dynamic_registration", "not code"],
    ),
    "unquoted": ("Files.site = hello", ["run.gin:3", "Files.site = hello", "quotes: 'hello'"]),
    "unquoted site": ("Files.site = 1.resid_post", ["run.gin:3", "strings in quotes"]),
    "lower-case constant": ("Model.tied = true", ["run.gin:3", "true is no value; write True"]),
    "no value": ("Model.k =", ["run.gin:3", "Model.k ="]),
    "no binding": ("Model.k", ["run.gin:3", "expected ':' or '='"]),
    "open bracket": ("Model.ks = (1, 2", ["run.gin:", "no valid gin"]),
    "call": ("Model.k = open('x')", ["run.gin:3", "open is no value"]),
    "arguments": ("Root.data = @Planted(3)", ["run.gin:3", "Expected ')'"]),
    "post_init": ("Model.k = 65", ["Model: k=65 must be", "Model.k at run.gin:3"]),
    "post_init in a scope": (
        "Model.k = 65\nRoot.model = @big/Model()",
        ["big/Model: k=65 must be", "Model.k at run.gin:3"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_message(case, run_file):
    text, expected = MISTAKES[case]
    base = BASE if "Root.model" not in text else "Model.width = 64\n\n"
    message = error([run_file(base + text + "\n")])
    assert [e for e in expected if e not in message] == [], message


def test_mistakes_in_flags_name_the_flag(run_file):
    name = run_file(BASE + "Model.k = 3\n")
    assert "--gin_bindings='Model.k = 1.5'" in error([name], ["Model.k = 1.5"])
    twice = error([name], ["Model.k = 1", "Model.k = 2"])
    assert "already at --gin_bindings='Model.k = 1'" in twice
    assert "strings need quotes: 'a'" in error([name], ["Files.site=a"])
    assert "holds no binding" in error([name], [""])
    assert "use --gin_file" in error([name], ["include 'run.gin'"])
    assert "is refused" in error([name], ["import os"])


def test_missing_files(run_file, tmp_path):
    name = run_file(BASE, "gin/zebra.gin")
    message = error(["gin/zerba.gin"], kind=FileNotFoundError)
    assert "'gin/zerba.gin'" in message and str(tmp_path) in message
    assert "Did you mean gin/zebra.gin?" in message
    assert "Did you mean gin/zebra.gin?" in error(["gin/Zebra.gin"], kind=FileNotFoundError)
    included = run_file("include 'bsae.gin'\n", "a.gin")
    message = error([included], kind=FileNotFoundError)
    assert "'bsae.gin'" in message and "included at a.gin:1" in message
    assert "read twice" in error([name, name])
    assert "does not exist" in error([str(tmp_path)], kind=FileNotFoundError)


def test_includes_are_one_level_deep_and_first(run_file):
    run_file(BASE, "base.gin")
    middle = run_file("include 'base.gin'\n", "middle.gin")
    outer = run_file("include 'middle.gin'\n", "outer.gin")
    assert load([middle])[0].model.width == 64
    assert "outer.gin" not in error([outer]) and "middle.gin:1" in error([outer])
    late = run_file("Model.k = 3\ninclude 'base.gin'\n", "late.gin")
    assert "late.gin:2" in error([late]) and "top of the file" in error([late])


def test_a_file_that_is_not_utf8(run_file):
    Path(run_file(BASE)).write_bytes(b"# caf\xe9\n")
    assert "run.gin is not UTF-8 at byte 5" in error(["run.gin"])


def test_an_import_statement_runs_nothing(run_file, tmp_path):
    run_file("open('ran', 'w').close()\n", "evil.py")
    error([run_file("import evil\n" + BASE)])
    assert not (tmp_path / "ran").exists()


def test_no_gin_log_lines(run_file, caplog):
    error(["missing.gin"], kind=FileNotFoundError)
    load([run_file(BASE)])
    assert caplog.records == []


def test_operative_text_is_complete_stable_and_parses_back(run_file):
    root, text, as_json = load([run_file(BASE)])
    assert text.startswith("# Root\nRoot.model = @Model()\nRoot.data = @Planted()\n")
    assert "Model.betas = (0.9, 0.999)" in text and "Planted.features = 8" in text
    again, text_again, json_again = load([run_file(text, "operative.gin")])
    assert (again, text_again, json_again) == (root, text, as_json)
    assert json.loads(json.dumps(as_json)) == as_json
    assert as_json["class"] == "Root" and as_json["model"]["class"] == "Model"


finite = st.floats(allow_nan=False, width=32)
words = st.builds(
    Words,
    source=st.text(max_size=8),
    percent=finite,
    limit=st.none() | st.integers(-9, 9),
)
roots = st.builds(
    Root,
    model=st.builds(
        Model,
        width=st.integers(8, 9),
        k=st.integers(0, 8),
        scale=st.none() | finite,
        betas=st.tuples(finite, finite),
        ks=st.lists(st.integers(), max_size=3).map(tuple),
        tied=st.booleans(),
    ),
    data=st.builds(Files, site=st.text(max_size=8), words=words, order=st.just("sorted"))
    | st.builds(Planted),
    probes=st.lists(words, max_size=3).map(tuple),
    seed=st.integers(),
)


@settings(max_examples=60, deadline=None)
@given(root=roots)
def test_any_object_survives_the_operative_text(root, tmp_path_factory):
    file = tmp_path_factory.mktemp("gin") / "operative.gin"
    classes = {globals()[name]: name for name in NAMES}
    file.write_text(schema.operative_text(root, classes), encoding="utf-8")
    assert load([str(file)])[0] == root


def test_nan_cannot_be_written():
    with pytest.raises(ValueError, match="nan cannot be written"):
        schema.literal(float("nan"))


def test_config_differences(run_file):
    name = run_file(BASE)
    old = load([name])[2]
    new = load([name], ["Model.k = 8", "Model.scale = 1"])[2]
    assert config.config_differences(old, old) == []
    assert config.config_differences(old, new) == ["model.k: 4 -> 8", "model.scale: None -> 1.0"]
    files = load([name], ["Root.data = @Files()", "Files.site = 'a'"])[2]
    assert config.config_differences(old, files) == ["data: @Planted() -> @Files()"]
    assert config.config_differences({"a": 1}, {"a": True}) == ["a: 1 -> True"]
    shorter = {k: v for k, v in old.items() if k != "seed"}
    assert config.config_differences(old, shorter) == ["seed: 0 -> (absent)"]
    assert config.config_differences(shorter, old) == ["seed: (absent) -> 0"]


def test_a_run_is_an_experiment_or_a_harvest():
    built = config.load_experiment(["gin/harvest.gin"])[0]
    assert type(built).__name__ == "HarvestRun"
    assert type(config.load_experiment(["gin/quickstart.gin"])[0]).__name__ == "Experiment"
    message = r"Experiment\.\w+ .*gin/quickstart.gin:\d+.* and HarvestRun\.\w+ .*are two runs"
    with pytest.raises(ValueError, match=message):
        config.load_experiment(["gin/quickstart.gin", "gin/harvest.gin"])


def test_differences_are_found_in_lists_of_what_has_names():
    def members(*sites):
        named = zip("ab", sites, strict=False)
        return {"members": [{"class": "M", "name": name, "site": site} for name, site in named]}

    assert config.config_differences(members(1, 2), members(1, 3)) == ["members.b.site: 2 -> 3"]
    assert config.config_differences(members(1, 2), members(1)) == ["members.b: @M() -> (absent)"]
    assert config.config_differences({"at": [1, 2]}, {"at": [1, 3]}) == ["at: [1, 2] -> [1, 3]"]
    assert config.config_differences(members(1), {"members": None})[0].endswith("-> None")


def test_list_configurables():
    text = config.list_configurables(TABLE)
    assert "Files: Activations from a model.\n  site: str (required)\n" in text
    assert "  words: @Words() = @Words()\n" in text
    assert "  data: @Files() or @Planted() = @Planted()\n" in text
    assert "  limit: int or None = None\n" in text
    assert "More lines" not in text


def test_the_fixed_table_names_frozen_dataclasses():
    """Every shipped configurable exists, is frozen, keyword-only, documented and expressible."""
    config.list_configurables()
    for name, cls in config.load_classes().items():
        assert cls.__dataclass_params__.frozen, name
        assert all(field.kw_only for field in dataclasses.fields(cls)), name
        assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), name


def test_shipped_gin_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = config.shipped_files()
    assert "gin/quickstart.gin" in shipped
    for name in shipped:
        assert os.path.isfile(config.find_file(name))
