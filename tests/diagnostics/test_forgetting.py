"""Exact check 7 of the rehearsal-free-cl sheet, and the matrix metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from guywire.core.errors import UsageError
from guywire.diagnostics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    global_forgetting,
    learning_accuracy,
    local_forgetting,
)

R = [[0.9], [0.6, 0.8], [0.3, 0.5, 0.7]]


def test_the_worked_example():
    assert global_forgetting(R) == pytest.approx(0.225, abs=1e-12)


def test_it_is_not_the_incremental_forgetting_of_the_sister_repository():
    # There: the drops from each task end to the next, summed over tasks, averaged over transitions
    # and tasks; on this table 0.3. The two must never be compared.
    drops = [R[i - 1][n] - R[i][n] for i in (1, 2) for n in range(i)]
    assert np.mean(drops) == pytest.approx(0.3)
    assert global_forgetting(R) != pytest.approx(np.mean(drops), abs=0.05)


def test_global_forgetting_weighs_tasks_by_their_classes():
    sizes = [2, 3, 5]
    expected = (2 / 5 * 0.3 + (2 / 10 * 0.6 + 3 / 10 * 0.3)) / 2
    assert global_forgetting(R, sizes) == pytest.approx(expected, abs=1e-12)


def test_local_forgetting_and_its_relatives():
    assert local_forgetting(R) == pytest.approx((0.6 + 0.3) / 2)
    assert forgetting(R) == local_forgetting(R)
    assert backward_transfer(R) == -forgetting(R)
    assert average_accuracy(R) == pytest.approx(0.5)
    assert learning_accuracy(R) == pytest.approx(0.8)


@pytest.mark.parametrize("above", [None, math.nan, 0.123])
def test_entries_above_the_diagonal_never_count(above):
    full = [[0.9, above, above], [0.6, 0.8, above], [0.3, 0.5, 0.7]]
    for metric in (global_forgetting, local_forgetting, average_accuracy, learning_accuracy):
        assert metric(full) == metric(R)


def test_a_single_task_has_nothing_to_forget():
    assert math.isnan(global_forgetting([[0.9]]))
    assert math.isnan(local_forgetting([[0.9]]))
    assert average_accuracy([[0.9]]) == 0.9


@pytest.mark.parametrize(
    "matrix", [[], [[0.9], [None, 0.8]], [[0.9], [0.6]], [[0.9, 0.1, 0.2], [0.6, 0.8]]]
)
def test_gaps_are_refused(matrix):
    with pytest.raises(UsageError, match="accuracy matrix"):
        global_forgetting(matrix)


@pytest.mark.parametrize("sizes", [[1, 2], [1, 0, 2]])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UsageError, match="3 positive numbers"):
        global_forgetting(R, sizes)
