"""The rules of the PEGO study on made-up tables."""

from __future__ import annotations

import pytest

from guywire.lab.studies.pego.claims import CLAIMS
from guywire.lab.studies.pego.data import STYLES
from guywire.lab.studies.pego.finetune import ARMS
from guywire.lab.studies.pego.page import CHECKS
from guywire.lab.studies.statistics import Table

RULES = {claim.name: claim.judge for claim in CLAIMS}


def table(seeds=(0, 1, 2), **changes):
    """All arms alike, but for ``changes``: ``PEGO_unseen=[value of each seed]`` or one value."""
    rows = []
    usual = {"unseen": 0.5, "seen": 0.6, "source validation": 0.6, "old": 0.3}
    for arm in ARMS:
        metrics = dict(usual)
        if arm not in ("probe", "full"):
            metrics |= {"preserve": 10.0, "diversify": 10.0, "merge error": 1e-6}
        for metric, value in metrics.items():
            given = changes.get(f"{arm}_{metric.replace(' ', '_')}", value)
            for i, seed in enumerate(seeds):
                one = given[i] if isinstance(given, list) else given
                rows.append({"condition": arm, "seed": seed, "metric": metric, "value": one})
        for style in STYLES:
            given = changes.get(f"{arm}_{style}", 0.5)
            for i, seed in enumerate(seeds):
                one = given[i] if isinstance(given, list) else given
                rows.append(
                    {"condition": arm, "seed": seed, "metric": f"unseen, {style}", "value": one}
                )
    return Table(rows)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.52, 0.52, 0.51], "reproduced"),
        ([0.55, 0.53, 0.499], "inconclusive"),  # one seed has the other sign
        ([0.505, 0.506, 0.507], "not reproduced"),
        ([0.505, 0.515, 0.509], "inconclusive"),
        ([0.45, 0.46, 0.45], "not reproduced"),
    ],
)
def test_a_point_above_full_fine_tuning(values, verdict):
    found = RULES["unseen"](table(PEGO_unseen=values))
    assert found.verdict == verdict
    assert "points from full fine-tuning" in found.allows


def test_few_seeds_claim_nothing():
    for name, rule in RULES.items():
        given = table(
            seeds=(0, 1), PEGO_unseen=0.6, PEGO_old=0.5, PEGO_preserve=0.1, PEGO_diversify=0.1
        )
        assert rule(given).verdict == "inconclusive", name


@pytest.mark.parametrize(
    ("mean", "below", "verdict"),
    [
        (0.51, 0, "reproduced"),
        (0.51, 4, "reproduced"),
        (0.51, 5, "inconclusive"),
        (0.50, 0, "inconclusive"),
        (0.49, 12, "not reproduced"),
    ],
)
def test_the_group_against_one_lora_counts_runs(mean, below, verdict):
    runs = [0.4 if i < below else 0.5 for i in range(12)]
    styles = {f"PEGO_{style}": runs[3 * i : 3 * i + 3] for i, style in enumerate(STYLES)}
    found = RULES["modules"](table(PEGO_unseen=mean, **styles))
    assert found.verdict == verdict
    assert f"in {below} of 12 runs" in found.allows


@pytest.mark.parametrize(
    ("preserve", "diversify", "valid", "verdict"),
    [
        (1.0, 0.5, 0.6, "reproduced"),
        (0.9, 0.9, 0.591, "reproduced"),
        (0.9, 0.9, 0.585, "not reproduced"),
        (0.9, 0.9, [0.58, 0.6, 0.58], "inconclusive"),
        ([0.9, 0.9, 1.1], 0.9, 0.6, "inconclusive"),
        (2.0, 0.1, 0.6, "not reproduced"),
        (0.1, 2.0, 0.6, "not reproduced"),
    ],
)
def test_overlaps_ten_times_lower_at_equal_accuracy(preserve, diversify, valid, verdict):
    made = table(PEGO_preserve=preserve, PEGO_diversify=diversify, PEGO_source_validation=valid)
    assert RULES["orthogonal"](made).verdict == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.33, 0.33, 0.32], "reproduced"),
        (0.31, "not reproduced"),
        ([0.34, 0.3, 0.33], "inconclusive"),
    ],
)
def test_two_points_more_of_what_pretraining_knew(values, verdict):
    assert RULES["preserved"](table(PEGO_old=values)).verdict == verdict


def test_the_checks_hold_and_fail():
    good = {
        "PEGO_preserve": 1.0,
        "PEGO_diversify": 1.0,
        "preserve_preserve": 1.0,
        "LoRA_diversify": 0.0,
    }
    assert all(check.holds(table(**good)) for check in CHECKS)
    broken = [
        {"PEGO_unseen": 1.5},
        {"group_merge_error": 1e-3},
        {"PEGO_preserve": 11.0},
        {"LoRA_diversify": 0.1},
        {"LoRA_seen": 0.65},
    ]
    for check, change in zip(CHECKS, broken, strict=True):
        assert not check.holds(table(**(good | change))), check.says


def test_claims_rest_on_choices_by_the_names_that_the_study_gives_them():
    names = {name for claim in CLAIMS for name in claim.rests_on}
    assert names == {
        *(f"{arm}, rate, without {style}" for arm in ("full", "LoRA") for style in STYLES),
        *(f"PEGO, strength, without {style}" for style in STYLES),
    }
