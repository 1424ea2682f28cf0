from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from guywire.core.errors import UsageError
from guywire.lab.training import CompareConfig, compare, resolve

SMALL: dict[str, Any] = {
    "stream": {"tasks": 2, "classes": 4, "max_per_class": 20},
    "epochs": 1,
    "batch_size": 16,
    "methods": ["finetune", "l2"],
    "seeds": 2,
    "workers": 0,
}


def config(**changes: Any) -> CompareConfig:
    return CompareConfig.model_validate({**SMALL, **changes})


def test_nothing_is_left_open_in_what_is_resolved() -> None:
    resolved, stream = resolve(config(seed=4))
    assert (resolved.model, resolved.optimizer, resolved.lr) == ("mlp", "adam", 0.001)
    assert resolved.stream.seed == 4
    assert len(stream.tasks) == 2
    kept, _ = resolve(config(seed=4, stream={**SMALL["stream"], "seed": 1}))
    assert kept.stream.seed == 1
    assert resolve(resolved)[0] == resolved


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"methods": ["l2"], "options": {"l2": {"select": "attention.*"}}},
            r"'l2' cannot be used with",
        ),
        ({"methods": ["l2"], "options": {"l2": {"strength": -1}}}, "strength is -1"),
        (
            {
                "methods": ["feature-distillation"],
                "options": {"feature-distillation": {"layer": "x"}},
            },
            "'feature-distillation' cannot be used",
        ),
        ({"methods": ["nothing"]}, "there is no method 'nothing'"),
        ({"model": "mlpp"}, "there is no model 'mlpp'"),
        ({"model": "minilm"}, "does not read images"),
        ({"stream": {"data": "digitz"}}, "digitz"),
        ({"stream": {"tasks": 99}}, "99"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        compare(config(out=str(tmp_path / "r"), **changes))
    assert not list(tmp_path.iterdir())


def test_a_comparison_leaves_a_table_of_everything(tmp_path: Path) -> None:
    found = compare(config(out=str(tmp_path / "r")))
    assert [(e["method"], e["seeds"]) for e in found.table] == [("finetune", 2), ("l2", 2)]
    assert found.failed == {}
    table = pyarrow.parquet.read_table(tmp_path / "r" / "results.parquet").to_pylist()
    assert {(r["method"], r["seed"]) for r in table} == {
        (m, s) for m in ("finetune", "l2") for s in (0, 1)
    }
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    assert facts["status"] == "done"
    assert facts["finished"]


def test_resuming_a_finished_run_changes_no_bit(tmp_path: Path) -> None:
    path = tmp_path / "r"
    first = compare(config(out=str(path)))
    before = (path / "results.parquet").read_bytes()
    second = compare(config(out=str(path)), resume=True)
    assert second.table == first.table
    assert (path / "results.parquet").read_bytes() == before


def test_a_failed_trial_is_told_and_the_run_marked(tmp_path: Path) -> None:
    found = compare(
        config(
            out=str(tmp_path / "r"),
            optimizer="sgd",
            methods=["finetune", "ewc"],
            options={"ewc": {"strength": 1e30}},
        )
    )
    assert set(found.failed) == {"ewc-seed0", "ewc-seed1"}
    assert [e["method"] for e in found.table] == ["finetune"]
    facts = json.loads((tmp_path / "r" / "run.json").read_text())
    assert facts["status"] == "failed"
    assert facts["failed"] == found.failed
