from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from guywire.core.errors import DataError
from guywire.lab.report.read import read_run

Make = Callable[..., Path]


def test_everything_is_read(make_run: Make) -> None:
    run = read_run(make_run(seeds=2, tasks=3))
    assert run.methods[:3] == ("finetune", "l2", "ewc")
    assert len(run.trials) == 14
    assert {t.status for t in run.trials} == {"done"}
    assert [t.classes for t in run.tasks] == [("0", "1"), ("2", "3"), ("4", "5")]
    assert run.tasks[1].sizes == {"train": 217, "valid": 54, "test": 90}
    assert sorted(run.trials[0].curves) == [0, 1, 2]
    assert len(run.trials[0].curves[0].step) == 180


def test_losses_are_no_accuracies(make_run: Make) -> None:
    trial = read_run(make_run(seeds=1, tasks=2)).trials[0]
    assert all((c.value >= 0).all() and (c.value <= 1).all() for c in trial.curves.values())
    assert -1 not in trial.curves


def test_missing_unfinished_and_failed_trials_are_told_apart(make_run: Make) -> None:
    import shutil

    folder = make_run(seeds=1, tasks=2)
    shutil.rmtree(folder / "trials" / "ewc-seed0")
    open_ = folder / "trials" / "l2-seed0"
    (open_ / "result.json").unlink()
    (open_ / "progress.json").write_text(json.dumps({"step": 40, "total": 120}))
    broken = folder / "trials" / "lwf-seed0"
    (broken / "result.json").unlink()
    (broken / "error.json").write_text(json.dumps({"error": "the loss is NaN at step 7"}))
    found = {t.method: (t.status, t.note) for t in read_run(folder).trials}
    assert found["ewc"] == ("missing", "it has not started")
    assert found["l2"] == ("unfinished", "it stopped at step 40 of 120")
    assert found["lwf"] == ("failed", "the loss is NaN at step 7")
    assert found["replay"] == ("done", "")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("run.json", b"{", "is not JSON"),
        ("run.json", b"[]", "holds no JSON object"),
        ("config.toml", b"= 3", "is not TOML"),
        ("trials/ewc-seed0/result.json", b"\xff", "is not JSON"),
        ("trials/ewc-seed0/metrics.parquet", b"PAR1", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(make_run: Make, file: str, content: bytes, words: str) -> None:
    folder = make_run(seeds=1, tasks=2)
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_run(folder)
    assert Path(file).name in str(caught.value)


def test_numbers_that_are_none_are_left_out(make_run: Make) -> None:
    folder = make_run(seeds=1, tasks=2)
    path = folder / "trials" / "ewc-seed0" / "result.json"
    result = json.loads(path.read_text())
    result["metrics"]["min_acc"] = None
    path.write_text(json.dumps(result))
    trial = next(t for t in read_run(folder).trials if t.method == "ewc")
    assert trial.metric("min_acc") is None
    assert trial.metric("accuracy") == result["metrics"]["accuracy"]
    assert trial.matrix[0][1] is None
