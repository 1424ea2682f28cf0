from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from guywire.core.errors import DataError, GuywireError, NonFiniteError, UsageError
from guywire.lab import streams
from guywire.lab.training import (
    CompareConfig,
    Comparison,
    Outcome,
    compare,
    grid,
    resolve,
    run_trial,
)
from guywire.lab.training.sweep import tune

SMALL: dict[str, Any] = {
    "stream": {"tasks": 2, "classes": 4, "max_per_class": 30, "valid_fraction": 0.3},
    "epochs": 2,
    "batch_size": 16,
    "methods": ["finetune", "l2"],
    "seeds": 1,
    "workers": 0,
    "evaluation": {"enabled": False},
}
SWEEP: dict[str, Any] = {"trials": 5, "batch": 2, "points": 3, "seeds": 1}


def config(out: Path, sweep: dict[str, Any], **changes: Any) -> CompareConfig:
    return CompareConfig.model_validate(
        {**SMALL, "out": str(out), "sweep": {**SWEEP, **sweep}, **changes}
    )


def written(folder: Path) -> Any:
    return json.loads((folder / "sweep.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Comparison]:
    """A comparison with each sampler that nobody disturbed; for tests that only read."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: compare(config(folder / name, {"sampler": name}))
        for name in ("grid", "random", "tpe")
    }


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_the_comparison_runs_with_the_best_on_validation_data(
    whole: dict[str, Comparison], tmp_path: Path, sampler: str
) -> None:
    found = whole[sampler]
    assert found.sweep is not None
    assert found.sweep == written(found.folder)
    (entry,) = found.sweep["methods"]
    scores = {t["number"]: t["score"] for t in entry["trials"]}
    assert len(scores) == (3 if sampler == "grid" else 5)
    assert entry["score"] == max(scores.values()) == scores[entry["best"]]
    assert found.sweep["not_tuned"] == ["finetune"]
    assert found.sweep["seeds"] == [1000]
    # The same trial by hand: this value, seed and the test data.
    by_hand = found.config.trial("l2", 0, {"l2": entry["chosen"]})
    ran = json.loads((found.folder / "trials" / "l2-seed0" / "result.json").read_text())
    fresh = grid.attempt(by_hand, tmp_path / "by-hand", resume=False)["result"]
    assert fresh["weights_sha256"] == ran["weights_sha256"]


def test_what_a_trial_of_a_sweep_scores_is_validation_data(tmp_path: Path) -> None:
    found = compare(config(tmp_path, {"methods": {"l2": {"strength": [0.1]}}}))
    assert found.sweep is not None
    _, stream = resolve(found.config)
    turned = dataclasses.replace(
        stream, tasks=tuple(dataclasses.replace(t, test=t.valid) for t in stream.tasks)
    )
    spec = found.config.trial("l2", 1000, {"l2": {"strength": 0.1}})
    by_hand = run_trial(spec, tmp_path / "x", stream=turned)
    trial = found.sweep["methods"][0]["trials"][0]["seeds"][0]
    assert trial["accuracy"] == by_hand["metrics"]["accuracy"]
    assert trial["forgetting"] == by_hand["metrics"]["forgetting"]


def test_no_test_data_can_reach_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = {"sampler": "tpe", "metric": "min_acc"}
    looked = {"evaluation": {"every": 1}}
    clean = compare(config(tmp_path / "clean", sweep, **looked))
    load = streams.load

    def poisoned(source: Any) -> Any:
        stream = load(source)
        tasks = []
        for task in stream.tasks:
            labels = task.test.labels.flip(0)
            split = dataclasses.replace(
                task.test, inputs=torch.full_like(task.test.inputs, 255), labels=labels
            )
            tasks.append(dataclasses.replace(task, test=split))
        return dataclasses.replace(stream, tasks=tuple(tasks))

    monkeypatch.setattr(streams, "load", poisoned)
    grid._stream.cache_clear()
    try:
        dirty = compare(config(tmp_path / "dirty", sweep, **looked))
    finally:
        grid._stream.cache_clear()
    assert (tmp_path / "clean/sweep.json").read_bytes() == (
        tmp_path / "dirty/sweep.json"
    ).read_bytes()
    # The poison works: what is reported of the same weights differs.
    assert [e["accuracy"]["mean"] for e in dirty.table] != [
        e["accuracy"]["mean"] for e in clean.table
    ]


@pytest.mark.parametrize(("sampler", "after"), [("random", 3), ("tpe", 0), ("tpe", 3)])
def test_a_sweep_that_was_stopped_goes_on_as_if_it_had_not_been(
    whole: dict[str, Comparison], tmp_path: Path, sampler: str, after: int
) -> None:
    undisturbed = whole[sampler]
    seen = 0

    def stop(outcome: Outcome) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(config(tmp_path / "cut", {"sampler": sampler}), done=stop)
    assert not (tmp_path / "cut/sweep.json").exists()
    again = compare(config(tmp_path / "cut", {"sampler": sampler}), resume=True)
    assert again.sweep == undisturbed.sweep
    folders = (undisturbed.folder, again.folder)
    assert len({(folder / "sweep.json").read_bytes() for folder in folders}) == 1
    weights = [
        json.loads((folder / "trials/l2-seed0/result.json").read_text())["weights_sha256"]
        for folder in folders
    ]
    assert weights[0] == weights[1]


def test_a_value_with_which_training_diverges_is_tried_and_not_chosen(tmp_path: Path) -> None:
    sweep = {"sampler": "grid", "methods": {"l2": {"strength": [0.1, 1e38]}}}
    found = compare(config(tmp_path, sweep, optimizer="sgd", lr=0.01))
    assert found.sweep is not None
    (entry,) = found.sweep["methods"]
    assert [t["score"] is None for t in entry["trials"]] == [False, True]
    assert "l2-1-seed1000" in entry["trials"][1]["seeds"][0]["error"]
    assert entry["chosen"] == {"strength": 0.1}
    assert entry["edges"] == {"strength": "low"}
    sweep["methods"]["l2"]["strength"] = [1e38]
    with pytest.raises(NonFiniteError, match="the sweep of 'l2' found no value"):
        compare(config(tmp_path / "all", sweep, optimizer="sgd", lr=0.01))
    facts = json.loads((tmp_path / "all/run.json").read_text())
    assert facts["status"] == "failed"


def test_any_other_failure_stops_the_sweep(
    whole: dict[str, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = grid.attempt

    def failing(spec: Any, directory: Path, resume: bool) -> dict[str, Any]:
        return {"error": f"{spec.id}: its process died"} if spec.sweep else real(spec, directory, resume)  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(grid, "attempt", failing)
        with pytest.raises(
            GuywireError, match="2 of 3 trials of the sweep failed, the first: l2-1"
        ):
            compare(config(tmp_path / "r", {}))
    again = compare(config(tmp_path / "r", {}), resume=True)
    assert again.sweep == whole["grid"].sweep


@pytest.mark.parametrize(
    ("scores", "minimised", "best", "edge"),
    [
        ([0.1, 0.5, 0.2], False, 1, None),
        ([0.1, 0.5, 0.7], False, 2, "high"),
        ([0.1, 0.5, 0.7], True, 0, "low"),
        ([0.5, 0.5, 0.5], False, 1, None),
        ([None, 0.5, 0.2], False, 1, None),
    ],
)
def test_choice_and_edge(
    tmp_path: Path, scores: list[float | None], minimised: bool, best: int, edge: str | None
) -> None:
    metric = "forgetting" if minimised else "accuracy"
    made = config(tmp_path, {"metric": metric, "methods": {"l2": {"strength": [1, 10, 100]}}})
    method = tune._Method("l2", made)
    for number in method.ask():
        spec = tune._spec(made, "l2", number, method.tried[number].values, 1000)
        score = scores[number]
        result = None if score is None else {"metrics": {metric: score}}
        method.tell(number, [Outcome(spec, result, None if score is not None else "diverged")])
    document = method.document()
    assert (document["best"], document["edges"].get("strength")) == (best, edge)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sweep": {"seeds": [0]}}, "0, which is a seed of the comparison"),
        ({"sweep": {"metric": "wc_acc"}}, "needs evaluation at every step"),
        ({"sweep": {"storage": "postgresql://h/x"}}, "for the sampler 'tpe'"),
        ({"methods": ["replay"], "sweep": {}}, "nothing to tune"),
        ({"sweep": {"methods": {"l2": {"strength": [-1.0]}}}}, "strength is -1"),
        ({"stream": {**SMALL["stream"], "valid_fraction": 0.0}, "sweep": {}}, "no validation data"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        compare(CompareConfig.model_validate({**SMALL, "out": str(tmp_path / "r"), **changes}))
    assert not list(tmp_path.iterdir())


def test_the_study_is_in_the_folder_and_another_runs_is_refused(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    found = compare(config(tmp_path / "a", {"sampler": "tpe"}))
    assert found.sweep is not None
    url = f"sqlite:///{tmp_path / 'a/sweep.db'}"
    storage = optuna.storages.RDBStorage(url)
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=study.study_name, storage=storage).trials
    rows = found.sweep["methods"][0]["trials"]
    assert [(t.params, t.value) for t in trials] == [(r["values"], r["score"]) for r in rows]
    storage.remove_session()
    storage.engine.dispose()
    # The folder of a run that tries other values, with that study in it.
    facts = json.loads((tmp_path / "a/run.json").read_text())
    compare(config(tmp_path / "b/a", {"sampler": "tpe", "trials": 3}))
    other = tmp_path / "b/a/run.json"
    mine = json.loads(other.read_text()) | {"sweep_id": facts["sweep_id"]}
    other.write_text(json.dumps(mine))
    (tmp_path / "b/a/sweep.db").write_bytes((tmp_path / "a/sweep.db").read_bytes())
    with pytest.raises(UsageError, match="is of another run or other settings"):
        compare(config(tmp_path / "b/a", {"sampler": "tpe", "trials": 3}), resume=True)
    (tmp_path / "a/sweep.db").write_bytes(b"SQLite it is not" * 400)
    with pytest.raises(DataError, match=r"sweep\.db is damaged"):
        compare(config(tmp_path / "a", {"sampler": "tpe"}), resume=True)
    (tmp_path / "a/sweep.db").unlink()
    assert compare(config(tmp_path / "a", {"sampler": "tpe"}), resume=True).sweep == found.sweep
