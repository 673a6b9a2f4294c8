"""The benchmark of the store runs, and its figures are ratios of the same bytes."""

import json

from saejax import store_bench


def test_the_first_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(store_bench.allocator, "keep_freed_memory", lambda: True)
    sizes = ["--shards", "2", "--contexts", "64", "--repetitions", "2", "--only", "2"]
    store_bench.main(["--folder", str(tmp_path), *sizes])
    write, read = map(json.loads, capsys.readouterr().out.splitlines())
    assert (write["name"], read["name"]) == ("durable write", "sequential read, cold")
    for figure in (write, read):
        assert len(figure["ratios"]) == 2 and min(figure["ratios"]) <= figure["ratio"] + 0.01
        assert figure["ratio"] > 0 and figure["target"].startswith(">=")
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
