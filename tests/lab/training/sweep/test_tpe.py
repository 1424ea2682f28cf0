from __future__ import annotations

import math
from pathlib import Path

import pytest

from guywire.core.errors import MissingExtraError, UsageError
from guywire.lab.training.sweep import tpe
from guywire.lab.training.sweep.config import SweepConfig
from guywire.lab.training.sweep.space import Axis

AXES = (Axis("strength", low=1e-3, high=1e3, log=True),)


def bump(strength: float) -> float:
    return math.exp(-((math.log10(strength) - 1.0) ** 2))


def search(sweep: SweepConfig, *who: str | int) -> list[tpe.Tried]:
    tried: list[tpe.Tried] = []
    while len(tried) < sweep.trials:
        batch = min(sweep.batch, sweep.trials - len(tried))
        for _ in range(batch):
            tried.append(tpe.Tried(tpe.suggest(AXES, tried, sweep, *who)))
        for one in tried[-batch:]:
            one.score, one.known = bump(one.values["strength"]), True
    return tried


def test_it_looks_where_it_was_good_and_repeats_itself(capfd: pytest.CaptureFixture[str]) -> None:
    sweep = SweepConfig(sampler="tpe", trials=24, batch=4)
    runs = [search(sweep, seed, "ewc") for seed in range(5)]
    assert [t.values for t in runs[0]] == [t.values for t in search(sweep, 0, "ewc")]
    assert [t.values for t in runs[0]] != [t.values for t in runs[1]]
    away = [[abs(math.log10(t.values["strength"]) - 1) for t in run] for run in runs]
    assert sum(sum(a[-8:]) for a in away) < 0.7 * sum(sum(a[:8]) for a in away)
    assert capfd.readouterr() == ("", "")  # Optuna is silent


def test_values_of_a_list_keep_their_kind() -> None:
    axes = (Axis("labels", ("true", 2.5, True)), Axis("n", low=1, high=9, whole=True))
    tried: list[tpe.Tried] = []
    for k in range(14):
        values = tpe.suggest(axes, tried, SweepConfig(sampler="tpe", trials=14), 0)
        assert (type(values["labels"]), values["labels"]) in {
            (str, "true"),
            (float, 2.5),
            (bool, True),
        }
        assert isinstance(values["n"], int)
        tried.append(tpe.Tried(values, None if k % 3 else 0.1 * k, known=True))


def test_a_half_finished_study_is_taken_up(tmp_path: Path) -> None:
    sweep = SweepConfig(sampler="tpe")
    ledger = tpe.Ledger("s", "mark", AXES, sweep, tmp_path)
    ledger.asked(0, {"strength": 1.5})
    ledger.asked(1, {"strength": 2.5})
    ledger.told(0, 0.25)
    ledger.close()
    again = tpe.Ledger("s", "mark", AXES, sweep, tmp_path)
    for number, strength in enumerate((1.5, 2.5, 3.5)):
        again.asked(number, {"strength": strength})
    for number, score in enumerate((0.25, None, 0.75)):
        again.told(number, score)
    assert [(t.params["strength"], t.value, t.state.name) for t in again.study.trials] == [
        (1.5, 0.25, "COMPLETE"),
        (2.5, None, "PRUNED"),
        (3.5, 0.75, "COMPLETE"),
    ]
    with pytest.raises(UsageError, match=r"has the score 0\.25 for trial 0"):
        again.told(0, 0.5)
    with pytest.raises(UsageError, match=r"has \{'strength': 1.5\} as trial 0"):
        again.asked(0, {"strength": 9.0})
    with pytest.raises(UsageError, match="misses trial 3"):
        again.asked(7, {"strength": 9.0})
    again.close()
    with pytest.raises(UsageError, match="another run or other settings"):
        tpe.Ledger("s", "another", AXES, sweep, tmp_path)


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    url = "postgresql://ann:s3cr3t@127.0.0.1:9/x"
    with pytest.raises(
        UsageError, match=r"cannot use the storage postgresql://ann@127.0.0.1:9/x"
    ) as e:
        tpe.Ledger("s", "m", AXES, SweepConfig(sampler="tpe", storage=url), tmp_path)
    assert "s3cr3t" not in str(e.value)
    assert "\n" not in str(e.value)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"guywire\[sweep\]"):
        tpe.suggest(AXES, [], SweepConfig(sampler="tpe"), 0)
