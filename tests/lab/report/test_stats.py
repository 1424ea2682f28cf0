from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from guywire.lab.report.stats import Interval, interval

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@given(NUMBERS)
def test_interval_equals_scipys(values: list[float]) -> None:
    found = interval(values)
    error = float(stats.sem(values))
    assert found is not None
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    low, high = (
        stats.t.interval(0.95, len(values) - 1, found.mean, error) if error else (found.mean,) * 2
    )
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-7), pytest.approx(high, abs=1e-7))


def test_what_is_no_number_is_left_out() -> None:
    assert interval([None, math.nan]) is None
    assert interval([None, 0.25, math.nan]) == Interval(0.25, None, None, 1)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [interval(rng.normal(3.0, 2.0, 3)) for _ in range(2000)]
    hits = [f.low <= 3.0 <= f.high for f in found if f and f.low is not None and f.high is not None]
    # Standard error of the share is 0.005.
    assert len(hits) == 2000
    assert abs(np.mean(hits) - 0.95) < 0.02


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((0, 1), (1, 2), True), ((0, 1), (1.1, 2), False), ((0, 3), (1, 2), True)],
)
def test_overlap(one: tuple[float, float], other: tuple[float, float], expected: bool) -> None:
    a, b = (Interval(0.5 * (x + y), x, y, 3) for x, y in (one, other))
    assert a.overlaps(b) is b.overlaps(a) is expected


def test_a_missing_interval_separates_nothing() -> None:
    assert Interval(0.0, None, None, 1).overlaps(Interval(9.0, 8.0, 10.0, 3))
