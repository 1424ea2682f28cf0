"""Exact checks 1 to 5 of the paper's sheet, and properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guywire.core.errors import UsageError
from guywire.diagnostics import (
    end_forgetting,
    final_accuracy,
    learning_curve_area,
    min_acc,
    wc_acc,
    windowed_forgetting,
    windowed_plasticity,
)

NAN = math.nan
CURVE = [0.9, 0.2, 0.5, 0.8, 0.6, 0.85]

accuracies = st.integers(0, 1000).map(lambda n: n / 1000)
curves = st.lists(accuracies, min_size=2, max_size=40)


def brute_force(curve, window):
    """The definition: the largest drop over all pairs inside all windows."""
    best = 0.0
    for t in range(len(curve)):
        inside = range(max(0, t - window + 1), t + 1)
        for m in inside:
            for n in inside:
                if m < n:
                    best = max(best, curve[m] - curve[n])
    return best


def test_the_worked_example():
    for window in (2, 3, None):
        assert windowed_forgetting(CURVE, window) == pytest.approx(0.7, abs=1e-12)
    assert windowed_plasticity(CURVE, 2) == pytest.approx(0.3, abs=1e-12)
    assert windowed_plasticity(CURVE, 3) == pytest.approx(0.6, abs=1e-12)


@given(curves, st.integers(2, 15))
@settings(max_examples=300, deadline=None)
def test_the_sliding_window_equals_brute_force(curve, window):
    assert windowed_forgetting(curve, window) == pytest.approx(
        brute_force(curve, window), abs=1e-12
    )


@given(curves, st.integers(2, 15))
@settings(deadline=None)
def test_symmetries(curve, window):
    rise = windowed_plasticity(curve, window)
    assert rise == pytest.approx(windowed_forgetting([1 - a for a in curve], window), abs=1e-12)
    assert rise == pytest.approx(windowed_forgetting(curve[::-1], window), abs=1e-12)
    assert windowed_forgetting(curve, window) <= windowed_forgetting(curve, window + 1)
    assert windowed_forgetting(curve, len(curve)) == windowed_forgetting(curve, None)
    assert windowed_forgetting(sorted(curve), window) == 0.0
    assert windowed_plasticity(sorted(curve, reverse=True), window) == 0.0


@given(st.lists(accuracies, min_size=6, max_size=40), st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None)
def test_coarser_evaluation_can_only_look_better(curve, end, period):
    steps = list(range(len(curve)))
    table = [[a, 0.5] for a in curve]
    coarse = sorted({*range(0, len(curve), period), end, len(curve) - 1})
    fine = min_acc(table, steps, [end])
    assert min_acc([table[i] for i in coarse], coarse, [end]) >= fine
    assert wc_acc(table, steps, [end]) <= final_accuracy(table) + 1e-12


@given(accuracies, accuracies, accuracies)
def test_with_evaluation_at_task_ends_alone(first, first_later, second):
    table, steps, ends = [[first, NAN], [first_later, second]], [10, 20], [10, 20]
    assert min_acc(table, steps, ends) == first_later
    assert wc_acc(table, steps, ends) == pytest.approx(final_accuracy(table), abs=1e-12)
    assert end_forgetting(table, steps, ends) == pytest.approx(first - first_later, abs=1e-12)
    drop = windowed_forgetting([row[0] for row in table], None)
    assert drop == pytest.approx(max(0.0, first - first_later), abs=1e-12)


def test_one_task_alone():
    table, steps = [[0.2], [0.6]], [0, 1]
    assert math.isnan(min_acc(table, steps, []))
    assert wc_acc(table, steps, []) == 0.6
    assert math.isnan(end_forgetting(table, steps, []))
    assert final_accuracy(table) == 0.6


def test_min_acc_starts_after_the_end_of_its_task_and_skips_the_current_one():
    table = [
        [0.1, NAN, NAN],  # task 1 is still being learned: its 0.1 must not count
        [0.9, NAN, NAN],
        [0.3, 0.0, NAN],
        [0.8, 0.9, NAN],
        [0.7, 0.5, 0.0],  # task 3 is current: its 0.0 must not count
        [0.6, 0.8, 0.4],
    ]
    steps, ends = [0, 5, 6, 10, 11, 15], [5, 10, 15]
    assert min_acc(table, steps, ends) == pytest.approx((0.3 + 0.5) / 2)
    assert wc_acc(table, steps, ends) == pytest.approx(0.4 / 3 + 2 / 3 * 0.4)
    assert end_forgetting(table, steps, ends) == pytest.approx(((0.9 - 0.6) + (0.9 - 0.8)) / 2)


def test_the_area_under_the_learning_curves_counts_the_first_evaluations_of_each_task():
    table = [[0.0, NAN], [0.2, NAN], [0.4, NAN], [0.9, 0.1], [0.5, 0.3], [0.5, 0.5], [0.5, 1.0]]
    steps, ends = [0, 1, 2, 3, 4, 5, 6], [3, 6]
    # The evaluations before a task's first update (0.0 and 0.1) do not count.
    assert learning_curve_area(table, steps, ends, beta=2) == pytest.approx((0.3 + 0.4) / 2)
    assert learning_curve_area(table, steps, ends) == pytest.approx((0.5 + 0.6) / 2)
    assert math.isnan(learning_curve_area([[0.5]], [0], []))


def test_gaps_in_a_curve_do_not_count():
    assert windowed_forgetting([0.9, NAN, NAN, 0.4], 2) == pytest.approx(0.5)


@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_too_small_is_refused(window):
    with pytest.raises(UsageError, match="at least 2"):
        windowed_forgetting(CURVE, window)


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="do not fit 3 steps"):
        min_acc([[0.1], [0.2]], [1, 2, 3], [])
    with pytest.raises(UsageError, match="need 2 ends, not 1"):
        wc_acc(np.ones((2, 3)), [1, 2], [1])
