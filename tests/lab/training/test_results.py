from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from guywire.lab.training.results import METRICS, aggregate, interval, rows, write

values = st.lists(st.floats(-1, 1), min_size=2, max_size=8)


@given(values)
def test_the_interval_is_scipys(data: list[float]) -> None:
    found = interval(data)
    error = float(stats.sem(data))
    assert found["mean"] == pytest.approx(np.mean(data), abs=1e-12)
    expected = stats.t.interval(0.95, len(data) - 1, np.mean(data), error) if error else None
    assert [found["low"], found["high"]] == pytest.approx(
        list(expected or (found["mean"],) * 2), abs=1e-9
    )


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    found = [interval(row) for row in draws]
    covered = np.mean([f["low"] <= 0.0 <= f["high"] for f in found])  # type: ignore[operator]
    assert covered == pytest.approx(0.95, abs=0.02)


@given(values, st.floats(-2, 2), st.floats(0.1, 3))
def test_the_interval_moves_and_stretches_with_the_data(
    data: list[float], shift: float, scale: float
) -> None:
    plain, moved = interval(data), interval([shift + scale * v for v in data])
    for key in ("mean", "low", "high"):
        assert moved[key] == pytest.approx(shift + scale * plain[key], abs=1e-9)  # type: ignore[operator]


def test_what_is_not_known_does_not_count() -> None:
    assert interval([None, float("nan")]) == {"mean": None, "low": None, "high": None}
    assert interval([None, 0.5]) == {"mean": 0.5, "low": None, "high": None}
    assert interval([0.1, None, 0.3])["mean"] == pytest.approx(0.2)


def result(method: str, seed: int, accuracy: float) -> dict[str, Any]:
    metrics: dict[str, Any] = dict.fromkeys(METRICS, 0.0) | {"accuracy": accuracy, "min_acc": None}
    matrix = [[0.9, None], [0.5, accuracy]]
    return {"method": method, "seed": seed, "accuracy_matrix": matrix, "metrics": metrics}


def test_seeds_are_put_together_by_method() -> None:
    found = aggregate([result("a", 0, 0.2), result("b", 0, 0.5), result("a", 1, 0.4)])
    assert [(e["method"], e["seeds"]) for e in found] == [("a", 2), ("b", 1)]
    assert found[0]["accuracy"]["mean"] == pytest.approx(0.3)
    assert found[1]["accuracy"] == {"mean": 0.5, "low": None, "high": None}
    assert set(found[0]) == {"method", "seeds", *METRICS}


def test_there_is_a_row_for_each_entry_and_each_summary(tmp_path: Path) -> None:
    import pyarrow.parquet

    results = [result("a", 0, 0.2), result("a", 1, 0.4)]
    write(tmp_path / "results.parquet", results)
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert list(table[0]) == ["method", "seed", "trained", "evaluated", "metric", "value"]
    assert len(table) == 2 * (3 + len(METRICS))
    entries = [(r["trained"], r["evaluated"], r["value"]) for r in table[:3]]
    assert entries == [(0, 0, 0.9), (1, 0, 0.5), (1, 1, 0.2)]
    summaries = {r["metric"]: r for r in table if r["evaluated"] == -1 and r["seed"] == 1}
    assert summaries["accuracy"]["value"] == 0.4
    assert summaries["min_acc"]["value"] is None
    assert {r["trained"] for r in summaries.values()} == {1}


def test_no_results_make_an_empty_table() -> None:
    assert all(column == [] for column in rows([]).values())
