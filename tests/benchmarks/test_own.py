from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


HALF = {
    "parameters": 100,
    "threads": 1,
    "time_ratio": 0.9,
    "time_ratios": [0.9, 0.8, 0.95, 0.85, 1.1],
    "gradient_bytes_ratio": 0.5,
    "state_bytes_ratio": 0.5,
    "limit_time": 0.92,
    "met": True,
}


def half(tmp_path, monkeypatch, found):
    own = module("own")
    (tmp_path / "half_fine_tuning.py").write_text(f"print({json.dumps(found)!r})")
    monkeypatch.setattr(own, "HERE", tmp_path)
    plan = module("comparisons").Plan()
    return own.run("half_fine_tuning", plan), plan


def test_a_line_has_every_repetition_and_the_limit_is_for_the_median(tmp_path, monkeypatch):
    rows, plan = half(tmp_path, monkeypatch, HALF)
    time, gradients, state = rows
    assert time.ours == {"median": 0.9, "low": 0.8, "high": 1.1, "each": HALF["time_ratios"]}
    assert time.verdict == "limit 0.92 kept"  # though the highest is above
    assert plan.answers == {"half_fine_tuning": HALF}
    table = module("page").table([dataclasses.asdict(r) for r in rows])
    assert "0.90 [0.80, 1.10] ratio" in table
    # counted, not timed: no spread
    assert gradients.ours == state.ours == module("driver").spread([0.5])
    assert "0.50 ratio" in table


def test_a_missed_limit_is_said_with_its_spread(tmp_path, monkeypatch):
    worse = HALF | {"time_ratio": 0.95, "time_ratios": [0.9, 0.95, 1.0]}
    rows, _ = half(tmp_path, monkeypatch, worse)
    said = module("page").losses([dataclasses.asdict(r) for r in rows])
    assert said == [f"{rows[0].figure}: 0.95 [0.90, 1.00] ratio, limit 0.92 missed."]


def test_an_answer_without_repetitions_says_so(tmp_path, monkeypatch):
    rows, _ = half(tmp_path, monkeypatch, HALF | {"time_ratios": None})
    assert len(rows) == 1
    assert rows[0].ours is None
    assert rows[0].verdict.startswith("not measured: half_fine_tuning.py ended with code 0")


def test_merges_are_divided_by_the_median_of_reading_and_writing(tmp_path, monkeypatch):
    own, merge = module("own"), module("merge")
    reading = itertools.cycle([2.0, 1.0, 4.0, 2.0])  # the first fills the cache
    ours, memory, typed = iter([3.0, 5.0, 4.0]), iter([300.0, 100.0, 200.0]), iter([8.0, 6.0, 9.0])
    monkeypatch.setattr(merge, "plain", lambda folder: merge.Run(next(reading), 1.0, 9.0, 1.0))
    monkeypatch.setattr(
        merge, "ours", lambda folder, *case: merge.Run(next(ours), 1.0, 9.0, next(memory))
    )
    monkeypatch.setattr(merge, "command", lambda folder: next(typed))
    args = argparse.Namespace(methods="ties", repeats=3, peer_repeats=0)
    found = merge.measure(tmp_path, args, None, None)
    assert found["read_and_write_seconds"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    time, private, command = own._merge(found)
    assert time[3:5] == (2.0, [1.5, 2.5, 2.0])
    assert private[3:5] == (300.0, [300.0, 100.0, 200.0])  # its limit is for the highest
    assert command[3:5] == (4.0, [4.0, 3.0, 4.5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "repeats"),
    [
        ("penalty", ["--rounds", "15"], {15, 4}),  # the autograd loops every fourth round
        ("data", ["--repeats", "3", "--steps", "5"], {3}),
        ("passes", ["--no-peers", "--case", "mlp", "--repeats", "3"], {3}),
        ("half_fine_tuning", ["--rounds", "3", "--steps", "1"], {3, 1}),
        ("pego", ["--rounds", "3"], {3}),
        ("pela", ["--rounds", "3", "--steps", "3"], {3}),
    ],
)
def test_scripts_tell_every_repetition(name, words, repeats, monkeypatch):
    own = module("own")
    read = own.SCRIPTS[name][0]
    monkeypatch.setitem(own.SCRIPTS, name, (read, words, None))
    plan = module("comparisons").Plan()
    rows = own.run(name, plan)
    assert {len(row.ours["each"]) for row in rows} == repeats
    for row, (figure, _, _, value, each, *_) in zip(rows, read(plan.answers[name]), strict=True):
        assert (row.figure, row.ours["each"]) == (figure, each)
        assert row.ours["median"] == pytest.approx(value)
        assert statistics.median(each) == row.ours["median"]
