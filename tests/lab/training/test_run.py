from __future__ import annotations

import json
from pathlib import Path

import pytest

from guywire.core.errors import DataError, UsageError
from guywire.lab import streams
from guywire.lab.training.config import CompareConfig
from guywire.lab.training.run import RunFolder, default_folder, list_runs


def started(path: Path, config: CompareConfig) -> RunFolder:
    run = RunFolder(path)
    assert not run.prepare(config, resume=False)
    run.started(["guywire", "compare", "--out", "a b"])
    run.describe(config, streams.load(config.stream))
    return run


CONFIG = CompareConfig(methods=("ewc",), seeds=2, lr=0.1)


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    run = started(tmp_path / "r", CONFIG)
    names = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()}
    assert names == {"config.toml", "run.json", "stream.json"} | {
        f"samples/task-{i}.png" for i in range(5)
    }
    facts = run.facts()
    assert facts["command"] == "guywire compare --out 'a b'"
    assert facts["status"] == "running"
    assert facts["versions"]["torch"]
    assert json.loads((run.path / "stream.json").read_text())["tasks"][0]["sizes"]["train"] > 0


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not empty: choose another folder"):
        RunFolder(tmp_path).prepare(CONFIG, resume=False)
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex' but no run to resume"):
        RunFolder(tmp_path).prepare(CONFIG, resume=True)
    with pytest.raises(UsageError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").prepare(CONFIG, resume=False)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path: Path) -> None:
    run = started(tmp_path, CONFIG)
    with pytest.raises(UsageError, match="add --resume"):
        run.prepare(CONFIG, resume=False)
    assert run.prepare(CONFIG.model_copy(update={"workers": 7, "out": "x"}), resume=True)
    with pytest.raises(UsageError, match=r"has lr = 0\.1, now it is 0\.2"):
        run.prepare(CONFIG.model_copy(update={"lr": 0.2}), resume=True)
    other = CONFIG.model_copy(update={"stream": CONFIG.stream.model_copy(update={"tasks": 2})})
    with pytest.raises(UsageError, match=r"has stream\.tasks = None, now it is 2"):
        run.prepare(other, resume=True)


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(UsageError, match="another process is at work"),
        RunFolder(tmp_path).locked(),
    ):
        pass


def test_runs_are_listed_with_how_far_they_came(tmp_path: Path) -> None:
    run = started(tmp_path / "a", CONFIG)
    (run.trials / "ewc-seed0").mkdir()
    (run.trials / "ewc-seed0" / "result.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    first, second = list_runs(tmp_path)
    assert first["status"] == "killed"  # nobody holds its lock
    assert (first["trials_done"], first["trials"], first["methods"]) == (1, 2, ["ewc"])
    assert second["status"] == "damaged"
    with run.locked():
        assert list_runs(tmp_path)[0]["status"] == "running"
    with pytest.raises(UsageError, match="there is no folder"):
        list_runs(tmp_path / "nowhere")


def test_damaged_facts_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json is damaged"):
        RunFolder(tmp_path).facts()


def test_new_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = set()
    for _ in range(3):
        folder = default_folder(CONFIG)
        folder.mkdir(parents=True)
        names.add(folder.name)
    assert len(names) == 3
