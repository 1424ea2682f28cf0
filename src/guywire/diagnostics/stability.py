"""How deep a learner falls between task ends: worst-case and windowed metrics of accuracy curves.

A continual learner that is measured at task ends alone looks steadier than it is: replay,
projections and penalties all lose old tasks for some dozens of steps after a switch and win them
back. These metrics see that. Notation: ``A(E_i, f_n)`` is the accuracy of the model after ``n``
updates on the evaluation set of task ``i``; ``e_i`` the last update of task ``i``; ``k`` the tasks
seen so far; ``t`` now.

    min-ACC = 1/(k-1) sum_{i<k} min_{e_i < n <= t} A(E_i, f_n)
    WC-ACC  = (1/k) A(E_k, f_t) + (1 - 1/k) min-ACC
    WF^w    = mean_i max_t ( max_{t-w < m <= t} a_m - a_t ),   WP^w likewise for the largest rise
    LCA_b   = mean_i of the mean accuracy over the first b evaluations of task i while it is learned

A window counts evaluations, not updates. Everything is O(1) amortised per evaluation, O(w) memory.

Source: De Lange, van de Ven, Tuytelaars, "Continual evaluation for lifelong learning: Identifying
the stability gap", arXiv 2205.13452; LCA: Chaudhry et al., arXiv 1812.00420.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from guywire.core.errors import UsageError
from guywire.diagnostics._sliding import Slide

__all__ = [
    "end_forgetting",
    "final_accuracy",
    "learning_curve_area",
    "min_acc",
    "wc_acc",
    "windowed_forgetting",
    "windowed_plasticity",
]

Curves = Sequence[Sequence[float]] | np.ndarray


def windowed_forgetting(curve: Sequence[float], window: int | None) -> float:
    """Return WF^w of one task: the largest drop inside any window of consecutive evaluations.

    Args:
        curve: accuracies in order of time; NaN where there was no evaluation.
        window: evaluations in a window, at least 2; ``None`` for the whole curve.

    Returns:
        The drop, at least 0; 0 for fewer than two evaluations.

    Raises:
        UsageError: the window is smaller than 2.

    Example:
        >>> round(windowed_forgetting([0.9, 0.2, 0.5, 0.8, 0.6, 0.85], 2), 6)
        0.7
    """
    slide = Slide(window)
    for value in curve:
        if not math.isnan(value):
            slide.push(float(value))
    return slide.worst


def windowed_plasticity(curve: Sequence[float], window: int | None) -> float:
    """Return WP^w of one task: the largest rise inside any window of consecutive evaluations.

    Args:
        curve: accuracies in order of time; NaN where there was no evaluation.
        window: evaluations in a window, at least 2; ``None`` for the whole curve.

    Returns:
        The rise, at least 0.

    Raises:
        UsageError: the window is smaller than 2.

    Example:
        >>> round(windowed_plasticity([0.9, 0.2, 0.5, 0.8, 0.6, 0.85], 3), 6)
        0.6
    """
    return windowed_forgetting([-value for value in curve], window)


def min_acc(curves: Curves, steps: Sequence[int], ends: Sequence[int]) -> float:
    """Return min-ACC: the worst accuracy of each previous task since it was learned, averaged.

    Args:
        curves: ``[evaluations, k]`` accuracies, tasks in the order learned; NaN where a task was
            not evaluated.
        steps: updates done at each evaluation, ``[evaluations]``, rising.
        ends: the last update ``e_i`` of each task but (at least) the last one.

    Returns:
        The average, NaN for a single task.

    Raises:
        UsageError: lengths do not fit.

    Example:
        >>> nan = float("nan")
        >>> min_acc([[0.9, nan], [0.4, 0.5], [0.7, 0.8]], [10, 11, 20], [10, 20])
        0.4
    """
    table, times = _table(curves, steps, ends)
    worst = [_worst(table[:, i], times, ends[i]) for i in range(table.shape[1] - 1)]
    return float(np.mean(worst)) if worst else math.nan


def wc_acc(curves: Curves, steps: Sequence[int], ends: Sequence[int]) -> float:
    """Return WC-ACC: the current task's accuracy and min-ACC, weighted 1/k and 1 - 1/k.

    Args:
        curves: as in :func:`min_acc`.
        steps: as in :func:`min_acc`.
        ends: as in :func:`min_acc`.

    Returns:
        A lower bound of the average accuracy now.

    Raises:
        UsageError: lengths do not fit.
    """
    table, _ = _table(curves, steps, ends)
    k = table.shape[1]
    last = _last(table[:, k - 1])
    return last if k == 1 else last / k + (1.0 - 1.0 / k) * min_acc(curves, steps, ends)


def final_accuracy(curves: Curves) -> float:
    """Return ACC: the last accuracy of each task, averaged.

    Args:
        curves: ``[evaluations, k]``; NaN where a task was not evaluated.

    Returns:
        The average.
    """
    table = np.asarray(curves, dtype=np.float64)
    return float(np.mean([_last(table[:, i]) for i in range(table.shape[1])]))


def end_forgetting(curves: Curves, steps: Sequence[int], ends: Sequence[int]) -> float:
    """Return FORG: accuracy of each previous task at its own end less that now, averaged.

    Args:
        curves: as in :func:`min_acc`.
        steps: as in :func:`min_acc`.
        ends: as in :func:`min_acc`; every task was evaluated at its end.

    Returns:
        The average, NaN for a single task.

    Raises:
        UsageError: lengths do not fit.
    """
    table, times = _table(curves, steps, ends)
    drops = [
        _last(table[times <= ends[i], i]) - _last(table[:, i]) for i in range(table.shape[1] - 1)
    ]
    return float(np.mean(drops)) if drops else math.nan


def learning_curve_area(
    curves: Curves, steps: Sequence[int], ends: Sequence[int], beta: int = 10
) -> float:
    """Return LCA: mean accuracy over the first evaluations of each task while it is learned.

    The evaluation before a task's first update does not count, since nothing was learned yet.

    Args:
        curves: as in :func:`min_acc`.
        steps: as in :func:`min_acc`.
        ends: as in :func:`min_acc`.
        beta: how many evaluations of a task count.

    Returns:
        The average over tasks; NaN if none was evaluated while it was learned.

    Raises:
        UsageError: lengths do not fit.
    """
    table, times = _table(curves, steps, ends)
    areas = []
    for i in range(table.shape[1]):
        begin = 0 if i == 0 else ends[i - 1]
        end = ends[i] if i < len(ends) else math.inf
        inside = table[(times > begin) & (times <= end), i]
        inside = inside[~np.isnan(inside)][:beta]
        if len(inside):
            areas.append(inside.mean())
    return float(np.mean(areas)) if areas else math.nan


def _table(
    curves: Curves, steps: Sequence[int], ends: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    table, times = np.asarray(curves, dtype=np.float64), np.asarray(steps)
    if table.ndim != 2 or len(table) != len(times) or len(table) == 0:
        raise UsageError(
            f"curves of shape {table.shape} do not fit {len(times)} steps: "
            "give one row an evaluation, one column a task"
        )
    if len(ends) < table.shape[1] - 1:
        raise UsageError(f"{table.shape[1]} tasks need {table.shape[1] - 1} ends, not {len(ends)}")
    return table, times


def _last(column: np.ndarray) -> float:
    known = column[~np.isnan(column)]
    return float(known[-1]) if len(known) else math.nan


def _worst(column: np.ndarray, times: np.ndarray, end: int) -> float:
    later = column[(times > end) & ~np.isnan(column)]
    return float(later.min()) if len(later) else _last(column)
