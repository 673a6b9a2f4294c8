"""A run directory belongs to one configuration; files in it are whole or not there."""

import errno
import json
import os
import pathlib
import threading

import pytest

import saejax
from saejax.rundir import RunDirectory, read_object, result_of, write_json, write_text

CONFIG = {"class": "Experiment", "sae": {"class": "SAE", "k": 4}, "loss": None}
OTHER = {"class": "Experiment", "sae": {"class": "SAE", "k": 8}, "loss": None}


def claim(folder, config=CONFIG, argv=("saejax", "--flag")):
    return RunDirectory(folder).claim(config, f"# {config['sae']['k']}\n", argv)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_naming_a_directory_creates_nothing(tmp_path):
    assert RunDirectory(tmp_path / "run").checkpoints == tmp_path / "run/checkpoints"
    assert names(tmp_path) == []


def test_a_claim_writes_what_the_run_is(tmp_path):
    claim(tmp_path / "a/b")
    run = RunDirectory(tmp_path / "a/b")
    assert names(run.path) == ["config.gin", "config.json", "run.json"]
    assert json.loads(run.config_json.read_text()) == CONFIG
    assert run.config_gin.read_text() == "# 4\n"
    content = json.loads(run.run_json.read_text())
    assert content["versions"]["saejax"] == saejax.__version__
    assert [start["argv"] for start in content["starts"]] == [["saejax", "--flag"]]


def test_the_same_configuration_joins_and_is_logged(tmp_path):
    claim(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, argv=["again"])
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["argv"] for start in starts] == [["saejax", "--flag"], ["again"]]


@pytest.mark.parametrize("made", ["activations", "checkpoints", "metrics.jsonl", "notes.txt"])
def test_another_configuration_is_refused_once_anything_was_made(tmp_path, made):
    claim(tmp_path)
    (tmp_path / made).mkdir()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(
        ValueError, match=r"another configuration \(sae\.k: 4 -> 8\); restore these"
    ):
        claim(tmp_path, OTHER)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_change_that_is_allowed_is_logged_and_kept(tmp_path, caplog):
    claim(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="or go on with the change with --allow_config_change"):
        claim(tmp_path, OTHER)
    RunDirectory(tmp_path).claim(OTHER, "# 8\n", ["x"], allow_change=True)
    assert "changed in this run, as --allow_config_change says: sae.k: 4 -> 8" in caplog.text
    assert read_object(tmp_path / "config.json") == OTHER
    starts = read_object(tmp_path / "run.json")["starts"]
    assert [start.get("changed") for start in starts] == [None, ["sae.k: 4 -> 8"]]
    claim(tmp_path, OTHER)  # from now on it is the run's own


def test_a_change_that_does_not_fit_is_taken_back(tmp_path):
    claim(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    run = RunDirectory(tmp_path)
    run.claim(OTHER, "# 8\n", ["x"], allow_change=True)
    with pytest.raises(ValueError, match="no fit"), run.change_accepted():
        raise ValueError("no fit")
    assert read_object(run.config_json) == CONFIG and run.config_gin.read_text() == "# 4\n"
    claim(tmp_path)


def test_tuples_are_the_lists_they_become(tmp_path):
    config = CONFIG | {"mesh": {"mesh_shape": (2, 4)}}
    claim(tmp_path, config)
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, config)


def test_how_it_is_computed_may_change(tmp_path):
    claim(tmp_path)  # by a version without such a part
    (tmp_path / "checkpoints").mkdir()
    for implementation in (None, "xla"):
        kernels = {"class": "Kernels", "implementation": implementation}
        claim(tmp_path, CONFIG | {"kernels": kernels})
    with pytest.raises(ValueError, match="another configuration"):
        claim(tmp_path, OTHER | {"kernels": kernels})
    nested = [{"recipe": CONFIG | {"kernels": k}} for k in ({"implementation": None}, kernels)]
    assert result_of(nested[0]) == result_of(nested[1]) == {"recipe": CONFIG}
    streams = [
        {"data": {"harvest": {"seed": 1, **more}}}
        for more in ({}, {"allow_other_computation": True})
    ]
    assert result_of(streams[0]) == result_of(streams[1]) == {"data": {"harvest": {"seed": 1}}}


def test_a_start_that_made_nothing_can_be_corrected(tmp_path):
    claim(tmp_path)
    claim(tmp_path, OTHER)
    assert json.loads((tmp_path / "config.json").read_text()) == OTHER
    assert (tmp_path / "config.gin").read_text() == "# 8\n"
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 2


@pytest.mark.parametrize(
    "left", [["config.gin.partial"], ["config.gin"], ["config.gin", "config.json"]]
)
def test_a_claim_that_was_cut_short_can_be_made_again(tmp_path, left):
    claim(tmp_path)
    for path in list(tmp_path.iterdir()):
        if path.name not in left:
            path.unlink()
    if "config.gin.partial" in left:
        (tmp_path / left[0]).write_text("# to")
    claim(tmp_path, OTHER)
    assert json.loads((tmp_path / "config.json").read_text()) == OTHER


@pytest.mark.parametrize("name", ["config.json", "run.json", "config.json.partial"])
def test_a_file_of_our_name_may_be_anothers(tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"model_type: 'gpt2' -> \(absent\)|holds no run"):
        claim(tmp_path)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == '{"model_type": "gpt2"}'


def test_many_changes_are_shortened(tmp_path):
    claim(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    many = CONFIG | {f"field{i}": i for i in range(20)}
    with pytest.raises(ValueError, match=r"field7: \(absent\) -> 7; \.\.\.\); restore"):
        claim(tmp_path, many)


def test_a_folder_without_a_configuration_is_someone_elses(tmp_path):
    for name in ("b", "a", "e", "d", "c"):
        (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=r"not empty \(a, b, c, d, \.\.\.\).*empty or new --workdir"
    ):
        claim(tmp_path)
    assert len(names(tmp_path)) == 5


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "\udcff", "[]", "3"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    claim(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        ValueError, match=r"config\.json (is damaged|holds no JSON object)"
    ) as caught:
        claim(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
        (OSError(errno.EROFS, "Read-only file system"), OSError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
    ],
)
def test_a_disk_that_refuses_is_told_with_its_reason(tmp_path, monkeypatch, failure, kind):
    """A read-only or full file system cannot be made without privileges: the call is replaced."""

    def refuse(*args, **kwargs):
        raise failure

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    message = rf"workdir = .* cannot be written \({failure.strerror}\); (give a --work|free some)"
    with pytest.raises(kind, match=message):
        claim(tmp_path / "run")


def test_a_change_that_is_refused_is_put_back_and_one_that_was_begun_is_not(tmp_path):
    for name, config in (("refused", CONFIG), ("begun", OTHER)):
        claim(tmp_path / name)
        run = RunDirectory(tmp_path / name)
        run.checkpoints.mkdir()
        for kind in (ValueError, FileNotFoundError):
            with pytest.raises(kind, match="no"), run.change_accepted():
                run.claim(OTHER, "# 8\n", ["x"], allow_change=True)
                if name == "begun":
                    (run.checkpoints / kind.__name__).mkdir()
                raise kind("no")
        assert json.loads(run.config_json.read_text()) == config


def test_a_cadence_of_checkpoints_is_no_other_run(tmp_path):
    claim(tmp_path, CONFIG | {"checkpoint": {"keep": 3}})
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, CONFIG | {"checkpoint": {"keep": 1}})


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=r"No space left on device: '.*/evaluation\.json'"):
        write_json(tmp_path / "evaluation.json", {})
    assert names(tmp_path) == []


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, "ü"]})
    assert read_object(path) == {"a": [1, 2.5, "ü"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("killed here")))
    monkeypatch.setattr(pathlib.Path, "replace", lambda *a: os.replace(*a))
    with pytest.raises(OSError, match="killed here"):
        write_text(path, "half a fi")
    assert read_object(path) == {"a": [1, 2.5, "ü"]}


def test_a_claim_is_seen_in_its_folder_alone(tmp_path):
    """Two machines with a folder of the same name: an old run of the same configuration in one."""
    claim(tmp_path / "theirs")
    token = claim(tmp_path / "ours")
    RunDirectory(tmp_path / "ours").require_claim(token, "process 0 of 2")
    message = r"workdir = .*/theirs of process 1 of 2 on .* not the folder that process 0 claimed"
    for name in ("theirs", "none"):
        with pytest.raises(FileNotFoundError, match=message.replace("theirs", name)):
            RunDirectory(tmp_path / name).require_claim(token, "process 1 of 2", seconds=0.2)
    assert claim(tmp_path / "ours") != token, "every start has its own"
    assert names(tmp_path) == ["ours", "theirs"]


def test_a_claim_that_is_seen_late_is_waited_for(tmp_path):
    token = claim(tmp_path / "a")
    timer = threading.Timer(0.3, lambda: (tmp_path / "a").rename(tmp_path / "b"))
    timer.start()
    RunDirectory(tmp_path / "b").require_claim(token, "process 1 of 2")
    timer.join()
