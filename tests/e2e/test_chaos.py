"""The chaos tool: a short run of it holds, and it finds what it is there to find."""

import json

import pytest

from launch import chaos

SMALL = [
    flag.replace("640_000", "64_000").replace("every_steps = 25", "every_steps = 5")
    for flag in chaos._TRAINING
]


def test_a_short_run_holds(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # compiled as for users
    code = chaos.main(["--minutes=0.4", "--seed=3", f"--folder={tmp_path}", "--", *SMALL])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "trainings ended bit by bit as the quiet one, through" in out and " x " in out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_longer_run_holds(tmp_path, processes, capsys):
    flags = ["--minutes=10", f"--processes={processes}", "--seed=1", f"--folder={tmp_path}"]
    assert chaos.main(flags) == 0, capsys.readouterr().out


def finished(folder, digest="a", nmse=0.5):
    """A run directory as far as the tool reads it."""
    (folder / "checkpoints/7").mkdir(parents=True)
    (folder / "checkpoints/3").mkdir()
    sealed = {"content": {"arrays": {"params.w_enc": {"digest": digest}}}}
    (folder / "checkpoints/7/metadata.json").write_text(json.dumps(sealed))
    record = {"step": 7, "nmse": nmse, "tokens_per_second": 1.0, "wait_share": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder.parent / f"{folder.name}.log").write_text("last words\n")
    return chaos.Run(folder, [], 1)


@pytest.mark.parametrize(
    ("change", "what"), [({"digest": "b"}, "digests"), ({"nmse": 0.6}, "records")]
)
def test_another_end_is_found(tmp_path, change, what):
    wanted = finished(tmp_path / "quiet").end()
    assert wanted == (7, {"params.w_enc": {"digest": "a"}}, [{"step": 7, "nmse": 0.5}])
    with pytest.raises(chaos.Unexpected, match=f"{what} of .*round0 are"):
        chaos._compare(finished(tmp_path / "round0", **change), wanted)


def test_an_exit_code_that_no_fault_explains_is_told(tmp_path):
    run = finished(tmp_path / "run")
    chaos._require(True, run, [0], None)
    with pytest.raises(
        chaos.Unexpected, match=r"exit codes \[1\] after kill; .*last: \nlast words"
    ):
        chaos._require(False, run, [1], "kill")


def test_a_flip_changes_one_bit(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "empty").touch()
    path, before = chaos.Chaos(0)._flip([tmp_path / "a", tmp_path / "empty"])
    assert before == bytes(100) and sum(b.bit_count() for b in path.read_bytes()) == 1


def test_the_command_line():
    options = chaos.parse(["--minutes=0.5", "--", "--gin_file=x"])
    assert (options.minutes, options.processes, options.seed) == (0.5, 1, 0)
    assert options.training == ["--gin_file=x"]
    assert chaos.parse([]).training == chaos._TRAINING
    with pytest.raises(SystemExit):
        chaos.parse(["--processes=3"])
