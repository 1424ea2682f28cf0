from __future__ import annotations

import pytest

from guywire.lab.studies.fisher_sequential_transfer.claims import CHECKS, CLAIMS, MANY
from guywire.lab.studies.statistics import Table

# Numbers with which every claim comes out, by (condition, metric): one value a seed.
GOOD = {
    ("plain", "test_loss"): [5.00, 5.10, 5.05],
    ("plain, chosen rate", "test_loss"): [4.99, 5.08, 5.05],
    ("L2", "test_loss"): [4.97, 5.06, 5.01],
    ("layer unfreezing", "test_loss"): [5.02, 5.12, 5.04],
    ("printed code", "test_loss"): [5.00, 5.10, 5.05],
    ("Fisher, constant", "test_loss"): [4.95, 5.06, 5.00],
    ("Fisher, decreasing", "test_loss"): [4.90, 5.00, 4.96],
    ("Fisher, constant", "valid_loss"): [4.95, 5.06, 5.00],
    ("Fisher, decreasing", "valid_loss"): [4.91, 5.01, 4.97],
    ("plain", "rougeL"): [10.0, 10.0, 10.0],
    ("Fisher, constant", "rougeL"): [11.0, 11.0, 11.0],
    ("Fisher, decreasing", "rougeL"): [12.0, 12.0, 12.0],
    ("plain", "a_rise"): [1.0, 1.2, 0.9],
    ("L2", "a_rise"): [0.6, 0.6, 0.6],
    ("Fisher, constant", "a_rise"): [0.2, 0.2, 0.2],
    ("Fisher, decreasing", "a_rise"): [0.3, 0.3, 0.3],
    ("plain" + MANY, "test_loss"): [4.50, 4.60, 4.55],
    ("Fisher, constant" + MANY, "test_loss"): [4.50, 4.60, 4.55],
    ("Fisher, decreasing" + MANY, "test_loss"): [4.48, 4.58, 4.53],
    ("printed code", "weak_pull_share"): [1.0, 1.0, 0.9],
}


def judge(name, changes=None):
    cells = GOOD | (changes or {})
    table = Table(
        {"condition": c, "metric": m, "seed": s, "value": v}
        for (c, m), values in cells.items()
        for s, v in enumerate(values)
    )
    (claim,) = [claim for claim in CLAIMS if claim.name.startswith(name)]
    return claim.judge(table)


@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e"])
def test_all_come_out_with_numbers_that_say_so(name):
    assert judge(name).verdict == "reproduced"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("a", {("Fisher, decreasing", "test_loss"): [4.995, 5.09, 5.04]}),  # below 0.02 nats
        ("b", {("Fisher, decreasing", "a_rise"): [0.7, 0.8, 0.6]}),  # more than half
        ("c", {("layer unfreezing", "test_loss"): [4.8, 4.9, 4.85]}),
        ("d", {("Fisher, decreasing" + MANY, "test_loss"): [4.0, 4.1, 4.05]}),  # a larger gain
        ("e", {("printed code", "weak_pull_share"): [0.1, 0.2, 0.1]}),
    ],
)
def test_each_fails_when_its_number_does(name, changes):
    assert judge(name, changes).verdict == "not reproduced"


def test_one_seed_of_the_other_sign_leaves_it_open():
    changes = {("Fisher, decreasing", "test_loss"): [5.01, 4.90, 4.80]}
    assert judge("a", changes).verdict == "inconclusive"


def test_the_arm_is_picked_on_validation_pairs_not_on_the_test():
    # the constant arm is far better on test pairs, the other on validation pairs
    found = judge("a", {("Fisher, constant", "test_loss"): [1.0, 1.0, 1.0]})
    assert "Fisher, decreasing lowers" in found.allows
    assert "0.097" in found.allows
    changes = {("Fisher, decreasing", "valid_loss"): [6.0, 6.0, 6.0]}
    assert "Fisher, constant lowers" in judge("a", changes).allows


def test_without_a_gain_there_is_none_to_shrink():
    found = judge("d", {("Fisher, decreasing", "test_loss"): [5.1, 5.2, 5.15]})
    assert found.verdict == "inconclusive"
    assert "no gain" in found.allows


def test_the_released_settings_are_called_weak_only_when_they_are():
    assert "barely regularise" in judge("e").allows
    changes = {("printed code", "weak_pull_share"): [0.1, 0.2, 0.1]}
    assert "barely regularise" not in judge("e", changes).allows


def check(words, cells, curves=()):
    (found,) = [c for c in CHECKS if words in c.says]
    rows = [{"condition": c, "metric": m, "seed": 0, "value": v} for (c, m), v in cells.items()] + [
        {"condition": c, "metric": "strength", "seed": 0, "value": v, "step": step}
        for c, values in curves
        for step, v in enumerate(values)
    ]
    return found.holds(Table(rows))


@pytest.mark.parametrize(("plain", "held", "holds"), [(2.0, 1.0, True), (1.0, 2.0, False)])
def test_checks_can_fail(plain, held, holds):
    distances = {("plain", "fisher_distance"): plain}
    distances |= {(f"Fisher, {k}", "fisher_distance"): held for k in ("constant", "decreasing")}
    assert check("at least as near", distances) is holds
    losses = {("stage A", "a_loss"): held, ("stage A", "a_loss_untrained"): plain}
    assert check("lowers their loss", losses) is holds
    arms = ("L2", "Fisher, constant", "Fisher, decreasing", "printed code")
    at_start = {(arm, "penalty_at_start"): held - 1.0 for arm in arms}
    assert check("zero at the anchor", at_start) is holds
    fishers = {("stage A", "printed_fisher_mean"): held, ("stage A", "fisher_mean"): plain}
    assert check("smaller than the Fisher", fishers) is holds
    curves = [("Fisher, constant", [1.0, 1.0]), ("Fisher, decreasing", [plain, held])]
    assert check("falls with the epochs", {}, curves) is holds
