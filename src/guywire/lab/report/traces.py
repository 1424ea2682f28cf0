"""Curves of several seeds: which tasks to show, where tasks begin, the mean over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guywire.lab.report.figures import Line
from guywire.lab.report.read import Curve, Trial

__all__ = ["borders", "lines", "mean_over_seeds", "shown_tasks"]

_MOST_TASKS = 6


def shown_tasks(trials: Sequence[Trial]) -> list[int]:
    """The tasks that can be chosen: all, or the first and some evenly spaced later ones."""
    tasks = sorted({k for t in trials for k in t.curves})
    if len(tasks) <= _MOST_TASKS:
        return tasks
    picks = np.linspace(0, len(tasks) - 1, _MOST_TASKS).round().astype(int)
    return [tasks[i] for i in picks]


def borders(trials: Sequence[Trial]) -> list[float]:
    """The steps after which tasks begin, and the last step: one more than there are tasks.

    A row of the metrics belongs to the task that was being trained, so a task ends at the last
    step that carries its number. Trials that are not done do not count when there are others.
    """
    trials = [t for t in trials if t.status == "done"] or trials
    ends: dict[int, float] = {}
    for trial in trials:
        for curve in trial.curves.values():
            for task in np.unique(curve.task).tolist():
                last = float(curve.step[curve.task == task].max())
                ends[int(task)] = max(ends.get(int(task), 0.0), last)
    start = min(float(c.step[0]) for t in trials for c in t.curves.values())
    edges = [min(start, 0.0), *(ends[k] for k in sorted(ends))]
    return edges if edges[-1] > edges[0] else [edges[0], edges[0] + 1.0]


def lines(trials: Sequence[Trial], tasks: Sequence[int]) -> list[Line]:
    """Lines of one method: every seed faint, the mean of the finished seeds bold.

    Args:
        trials: the trials of one method that have curves.
        tasks: the evaluated tasks to show, in the order of the choices; the mean of the tasks seen
            is the choice after them when there are several tasks.

    Returns:
        The lines.
    """
    found = []
    for key in range(len(tasks) + (len(tasks) > 1)):
        curves = []
        for trial in trials:
            curve = trial.curves.get(tasks[key]) if key < len(tasks) else _mean_of_seen(trial)
            if curve is not None:
                curves.append((trial.status == "done", curve))
        if len(curves) > 1:
            found += [Line(key, c.step, c.value, main=False) for _, c in curves]
        whole = [c for done, c in curves if done] or [c for _, c in curves]
        if whole:
            found.append(Line(key, *mean_over_seeds(whole), main=True))
    return found


def mean_over_seeds(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of curves at the steps that all of them have.

    Args:
        curves: at least one.

    Returns:
        Steps ``[M]`` and means ``[M]``.
    """
    steps = curves[0].step
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.step)
    total = np.zeros(len(steps))
    for curve in curves:
        total += curve.value[np.searchsorted(curve.step, steps)]
    return steps, total / len(curves)


def _mean_of_seen(trial: Trial) -> Curve:
    """At every step the mean over the tasks up to the one being trained."""
    step = np.concatenate([c.step for c in trial.curves.values()])
    task = np.concatenate([c.task for c in trial.curves.values()])
    value = np.concatenate([c.value for c in trial.curves.values()])
    evaluated = np.concatenate([np.full(len(c.step), k) for k, c in trial.curves.items()])
    seen = evaluated <= task
    steps, inverse = np.unique(step[seen], return_inverse=True)
    counts = np.bincount(inverse)
    tasks = np.zeros(len(steps), dtype=int)
    np.maximum.at(tasks, inverse, task[seen].astype(int))
    return Curve(steps, tasks, np.bincount(inverse, weights=value[seen]) / counts)
