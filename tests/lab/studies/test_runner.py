from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from guywire.core.errors import DataError, UsageError
from guywire.lab import studies
from guywire.lab.studies.pool import StudyError
from guywire.lab.studies.runner import resolve, run_study

COIN = Path(__file__).with_name("falling_coin.py")


@pytest.fixture
def go(tmp_path):
    def call(name=COIN, **arguments):
        arguments = {"workers": 1, "cache": tmp_path / "cache"} | arguments
        return run_study(str(name), tmp_path / "out", **arguments)

    return call


def test_the_result_file_says_everything(go, tmp_path):
    result = go()
    on_disk = json.loads((tmp_path / "out/falling-coin/full/result.json").read_text())
    assert on_disk == {k: v for k, v in result.items() if k != "folder"}
    (claim,) = result["claims"]
    assert claim["verdict"] == "reproduced"
    assert "1.000" in claim["allows"]
    (difference,) = result["differences"]
    assert difference["mean"] == pytest.approx(1.0)
    assert difference["values"] == {"0": 1.0, "1": 1.0, "2": 1.0}
    cells = {(s["condition"], s["metric"]): s for s in result["statistics"]}
    assert cells["held", "test"]["mean"] == pytest.approx(0.01)
    assert result["versions"]["torch"] == torch.__version__ or result["versions"]["torch"]
    assert result["cost"]["units"] == 9
    assert result["cost"]["peak_memory_mb"] > 10
    rows = pd.read_parquet(tmp_path / "out/falling-coin/full/rows.parquet")
    assert set(rows.columns) == {"condition", "seed", "metric", "value", "step"}
    assert len(rows) == 2 * 3 * 5
    curve = next(c for c in result["curves"] if c["condition"] == "plain")
    assert curve["steps"] == [0, 1, 2]


def test_a_second_call_computes_nothing_and_says_the_same(go):
    first, second = go(), go()
    assert first["computed_units"] == 9
    assert second["computed_units"] == 0
    for key in ("claims", "statistics", "differences", "choices", "cost"):
        assert first[key] == second[key]
    assert go(fresh=True)["computed_units"] == 9


def test_more_seeds_compute_only_the_new_ones(go):
    go(seeds=2)
    assert go(seeds=4)["computed_units"] == 6


def test_settings_and_source_are_in_the_key(go, tmp_path):
    go()
    assert go(overrides={"noise": 0.25})["computed_units"] == 9
    changed = tmp_path / "falling_coin.py"
    changed.write_text(COIN.read_text() + "\n# a word more\n")
    assert go(changed)["computed_units"] == 9


def test_a_failed_study_goes_on_where_it_stopped(go, tmp_path):
    with pytest.raises(StudyError, match=r"drop of held, seed 0.*the coin is lost"):
        go(overrides={"explode": "held"})
    folder = next((tmp_path / "cache/studies/falling-coin").iterdir())
    assert len(list(folder.glob("*.json"))) == 4  # three starts, and plain of seed 0


def test_a_unit_whose_file_is_gone_is_done_again(go, tmp_path):
    go()
    next((tmp_path / "cache").rglob("start-1.safetensors")).unlink()
    assert go()["computed_units"] == 1


def test_a_damaged_record_is_done_again(go, tmp_path):
    go()
    next((tmp_path / "cache").rglob("drop-seed2-*.json")).write_text('{"rows": [')
    assert go()["computed_units"] == 1


def test_smoke_never_claims(go):
    result = go(smoke=True)
    assert [c["verdict"] for c in result["claims"]] == ["smoke"]
    assert result["size"] == "smoke"
    assert result["settings"]["noise"] == 0.5


def test_fewer_than_three_seeds_are_inconclusive(go):
    assert go(seeds=2)["claims"][0]["verdict"] == "inconclusive"


def test_the_best_strength_on_the_edge_widens_the_grid(go):
    result = go(overrides={"optimum": 2.0})
    (choice,) = result["choices"]
    assert choice["grid"] == [0.1, 1.0, 10.0, 100.0, 1000.0]
    assert choice["best"] == 100.0
    assert choice["widened"] == 3
    assert not choice["on_edge"]
    assert result["claims"][0]["verdict"] == "reproduced"


def test_downwards_too(go):
    (choice,) = go(overrides={"optimum": -2.0})["choices"]
    assert choice["grid"] == [0.001, 0.01, 0.1, 1.0]
    assert choice["best"] == 0.01


def test_a_grid_still_on_its_edge_claims_nothing(go):
    result = go(overrides={"optimum": 9.0})
    assert result["choices"][0]["on_edge"]
    assert result["claims"][0]["verdict"] == "inconclusive"
    assert "edge" in result["claims"][0]["allows"]


def test_the_global_random_state_is_left_alone(go):
    before = torch.get_rng_state()
    go()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.multiprocess
def test_two_processes_give_the_same_as_one(go, tmp_path):
    one = go()
    two = go(workers=2, cache=tmp_path / "other")
    assert two["computed_units"] == 9
    for key in ("claims", "statistics", "curves"):
        assert one[key] == two[key]


@pytest.mark.multiprocess
def test_a_failure_in_a_worker_is_one_sentence(go):
    with pytest.raises(StudyError, match="the coin is lost"):
        go(workers=2, overrides={"explode": "plain"})


def test_words_that_are_wrong(go):
    with pytest.raises(UsageError, match="no setting 'noize': did you mean 'noise'"):
        go(overrides={"noize": 1.0})
    with pytest.raises(UsageError, match="must be of the type of"):
        go(overrides={"noise": "loud"})
    with pytest.raises(UsageError, match="at least one seed"):
        go(seeds=0)
    with pytest.raises(UsageError, match="--workers 0"):
        go(workers=0)
    with pytest.raises(UsageError, match="did you mean 'fisher-sequential-transfer'"):
        studies.load("fisher-sequential")
    with pytest.raises(UsageError, match="there is no file"):
        studies.load("nowhere.py")


def test_a_file_without_a_study(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UsageError, match="defines no STUDY"):
        studies.load(str(tmp_path / "empty.py"))


def test_an_integer_serves_where_a_float_is_meant():
    study = studies.load(str(COIN))
    assert resolve(study, smoke=False, overrides={"noise": 1})["noise"] == 1.0


def test_missing_data_is_named(tmp_path, monkeypatch):
    text = (
        COIN.read_text()
        .replace(
            "    run=run,\n", "    run=run,\n    inputs=lambda s: [Path('no/such/data.txt')],\n"
        )
        .replace("import torch\n", "from pathlib import Path\n\nimport torch\n", 1)
    )
    changed = tmp_path / "coin_with_data.py"
    changed.write_text(text)
    with pytest.raises(DataError, match=r"no/such/data\.txt cannot be read"):
        run_study(str(changed), tmp_path / "out", cache=tmp_path / "cache", workers=1)


def test_every_study_of_ours_is_well_formed():
    for slug in studies.STUDIES:
        study = studies.load(slug)
        assert study.slug == slug
        assert study.claims
        assert len({c.name for c in study.claims}) == len(study.claims)
        assert set(study.smoke) <= set(study.settings)
        json.dumps([dict(study.settings), dict(study.smoke)])
