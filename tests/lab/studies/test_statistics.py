from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.lab.studies.statistics import Interval, Table, bootstrap
from guywire.lab.studies.verdict import exceeds


def rows(condition, metric, values, **more):
    return [
        {"condition": condition, "seed": s, "metric": metric, "value": v, **more}
        for s, v in enumerate(values)
    ]


def test_the_interval_is_that_of_all_resamples():
    values = [1.0, 2.0, 4.0]
    every = np.array([np.mean(draw) for draw in itertools.product(values, repeat=3)])
    interval = bootstrap(dict(enumerate(values)))
    # 27 equally likely means: the extreme ones have probability 1/27 > 2.5 %, so they are the ends
    assert interval.low == pytest.approx(every.min())
    assert interval.high == pytest.approx(every.max())
    assert interval.mean == pytest.approx(7 / 3)


def test_the_interval_of_many_normal_values_is_the_normal_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    interval = bootstrap(dict(enumerate(values)))
    error = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - error, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + error, abs=0.03)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12), st.floats(-10, 10))
def test_the_interval_holds_the_mean_and_moves_with_the_values(values, shift):
    a = bootstrap(dict(enumerate(values)))
    b = bootstrap({s: v + shift for s, v in enumerate(values)})
    assert a.low - 1e-6 <= a.mean <= a.high + 1e-6
    assert min(values) - 1e-6 <= a.low
    assert a.high <= max(values) + 1e-6
    assert b.low == pytest.approx(a.low + shift, abs=1e-4)
    assert b.high == pytest.approx(a.high + shift, abs=1e-4)


def test_one_seed_has_no_interval():
    interval = bootstrap({0: 3.0})
    assert interval.low is None
    assert interval.words() == "3.000"
    assert interval.to_json()["n"] == 1


def test_what_is_not_finite_is_null_in_json():
    entry = bootstrap({0: math.inf, 1: 1.0}).to_json()
    assert entry["mean"] is None
    assert entry["values"] == {"0": None, "1": 1.0}


def test_differences_are_paired_by_seed_not_by_place():
    table = Table([*rows("a", "m", [10.0, 20.0, 30.0]), *rows("b", "m", [9.0, 19.0, 29.0])[::-1]])
    difference = table.difference("a", "b", "m")
    assert difference.values == {0: 1.0, 1: 1.0, 2: 1.0}
    assert (difference.low, difference.high) == (1.0, 1.0)  # unpaired it would be wide
    assert table.differences["a", "b", "m"] is difference


def test_only_shared_seeds_are_paired():
    table = Table([*rows("a", "m", [1.0, 2.0, 3.0]), *rows("b", "m", [0.0, 0.0])])
    assert table.difference("a", "b", "m").n == 2
    table = Table(
        [*rows("a", "m", [1.0]), {"condition": "b", "seed": 5, "metric": "m", "value": 0}]
    )
    with pytest.raises(UsageError, match="share no seed"):
        table.difference("a", "b", "m")


def test_rows_with_a_step_are_curves():
    table = Table([*rows("a", "m", [1.0, 3.0], step=0), *rows("a", "m", [5.0, 5.0], step=10)])
    (curve,) = table.curves()
    assert curve["steps"] == [0, 10]
    assert curve["mean"] == [2.0, 5.0]
    assert table.statistics() == []


def test_doubled_and_missing_rows_are_named():
    with pytest.raises(UsageError, match="two rows for condition 'a', seed 0, metric 'm'"):
        Table([*rows("a", "m", [1.0]), *rows("a", "m", [2.0])])
    with pytest.raises(UsageError, match="no rows with condition 'b'"):
        Table(rows("a", "m", [1.0])).values("b", "m")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.2, 0.3, 0.4], "reproduced"),
        ([0.02, 0.05, 0.06], "not reproduced"),  # all below the threshold of 0.1
        ([-0.1, 0.4, 0.4], "inconclusive"),  # large on average, but one seed disagrees
        ([0.05, 0.08, 0.12], "inconclusive"),  # the interval straddles the threshold
        ([-0.3, -0.2, -0.4], "not reproduced"),
        ([0.5, 0.5], "inconclusive"),  # two seeds
        ([0.5, math.nan, 0.5], "inconclusive"),
    ],
)
def test_the_rule(values, verdict):
    assert exceeds(bootstrap(dict(enumerate(values))), 0.1) == verdict


def test_the_sign_in_every_seed_can_be_waived():
    interval = Interval(0.25, 0.1, 0.4, {0: -0.1, 1: 0.4, 2: 0.45})
    assert exceeds(interval, 0.1, every_seed=False) == "reproduced"
