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
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from guywire.core.errors import CheckpointError, UsageError

__all__ = [
    "StabilityTracker",
    "average_accuracy",
    "end_forgetting",
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
    slide = _Slide(window)
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


def average_accuracy(curves: Curves) -> float:
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


class StabilityTracker:
    """All metrics of this page, updated one evaluation at a time.

    Args:
        windows: sizes of the windows, in evaluations.
        beta: of LCA.

    Example:
        >>> tracker = StabilityTracker(windows=(2,))
        >>> tracker.begin_task("one")
        >>> for step, value in enumerate([0.1, 0.9]):
        ...     tracker.update(step, {"one": value})
        >>> tracker.end_task()
        >>> tracker.begin_task("two")
        >>> tracker.update(2, {"one": 0.3, "two": 0.5})
        >>> tracker.update(3, {"one": 0.8, "two": 0.7})
        >>> tracker.metrics()["min_acc"], round(tracker.metrics()["wc_acc"], 6)
        (0.3, 0.5)
    """

    def __init__(self, windows: Sequence[int] = (10, 100), beta: int = 10) -> None:
        self.windows = tuple(windows)
        self.beta = beta
        self.order: list[str] = []
        self.current: str | None = None
        self._records: dict[str, _Record] = {}
        self._switch = 0
        self._step = 0
        for window in self.windows:
            _Slide(window)

    def begin_task(self, name: str) -> None:
        """Say that a task begins.

        Args:
            name: of the task. One that was learned before becomes the current one again.

        Raises:
            UsageError: another task has not ended.
        """
        if self.current is not None:
            raise UsageError(
                f"task {name!r} begins before {self.current!r} ended: end_task() first"
            )
        if name in self.order:
            self.order.remove(name)
        else:
            self._records[name] = _Record(self.windows)
        self.order.append(name)
        self.current = name
        self._switch = self._step

    def end_task(self) -> None:
        """Say that the current task ends, after its last evaluation.

        Raises:
            UsageError: no task has begun.
        """
        if self.current is None:
            raise UsageError("no task to end: begin_task(name) first")
        record = self._records[self.current]
        record.at_end, record.lowest = record.last, math.inf
        self.current = None

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Take in one evaluation.

        Args:
            step: updates done so far in the whole stream.
            values: task names to accuracies; tasks that have begun, all or some.

        Raises:
            UsageError: a task has not begun.
        """
        self._step = step
        for name, value in values.items():
            record = self._records.get(name)
            if record is None:
                raise UsageError(f"task {name!r} was evaluated but has not begun: begin_task(name)")
            record.last = value
            for slide in record.falls:
                slide.push(value)
            for slide in record.rises:
                slide.push(-value)
            if name != self.current:
                record.lowest = min(record.lowest, value)
            elif step > self._switch and record.area_count < self.beta:
                record.area_sum += value
                record.area_count += 1

    def metrics(self) -> dict[str, float]:
        """Return the metrics now.

        Returns:
            ``min_acc``, ``wc_acc``, ``wf<w>`` and ``wp<w>`` for each window, ``average_accuracy``,
            ``forgetting``, ``lca<beta>``. NaN where undefined: ``min_acc`` and ``forgetting`` of a
            single task.
        """
        records = [self._records[name] for name in self.order if self._records[name].seen]
        if not records:
            return {}
        # The last task in the order is the current one, also at its end: min-ACC skips it.
        previous, k = records[:-1], len(records)
        lows = [r.last if math.isinf(r.lowest) else r.lowest for r in previous]
        low = _mean(lows)
        last = records[-1].last
        out = {
            "min_acc": low,
            "wc_acc": last if k == 1 else last / k + (1.0 - 1.0 / k) * low,
        }
        for j, window in enumerate(self.windows):
            out[f"wf{window}"] = _mean([r.falls[j].worst for r in records])
            out[f"wp{window}"] = _mean([r.rises[j].worst for r in records])
        out["average_accuracy"] = _mean([r.last for r in records])
        out["forgetting"] = _mean([r.at_end - r.last for r in previous])
        areas = [r.area_sum / r.area_count for r in records if r.area_count]
        out[f"lca{self.beta}"] = _mean(areas)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on.

        Returns:
            A tree.
        """
        return {
            "windows": list(self.windows),
            "beta": self.beta,
            "order": list(self.order),
            "current": self.current,
            "switch": self._switch,
            "step": self._step,
            "records": [self._records[name].state() for name in self.order],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Args:
            state: the tree.

        Raises:
            CheckpointError: windows or beta differ.
        """
        if tuple(state["windows"]) != self.windows or state["beta"] != self.beta:
            raise CheckpointError(
                f"the saved metrics have windows {state['windows']} and beta {state['beta']}, "
                f"these {list(self.windows)} and {self.beta}: use the same"
            )
        self.order = list(state["order"])
        self.current = state["current"]
        self._switch, self._step = int(state["switch"]), int(state["step"])
        self._records = {}
        for name, saved in zip(self.order, state["records"], strict=True):
            self._records[name] = _Record(self.windows)
            self._records[name].load(saved)


class _Slide:
    """The largest fall below the maximum of a sliding window, by a monotone deque."""

    def __init__(self, window: int | None) -> None:
        if window is not None and window < 2:
            raise UsageError(f"a window of {window} evaluations sees no drop: use at least 2")
        self.window = window
        self.worst = 0.0
        self.count = 0
        self.queue: deque[tuple[int, float]] = deque()

    def push(self, value: float) -> None:
        while self.queue and self.queue[-1][1] <= value:
            self.queue.pop()
        self.queue.append((self.count, value))
        if self.window is not None and self.queue[0][0] <= self.count - self.window:
            self.queue.popleft()
        self.count += 1
        self.worst = max(self.worst, self.queue[0][1] - value)

    def state(self) -> dict[str, Any]:
        return {
            "worst": self.worst,
            "count": self.count,
            "index": torch.tensor([i for i, _ in self.queue], dtype=torch.int64),
            "value": torch.tensor([v for _, v in self.queue], dtype=torch.float64),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.worst, self.count = float(state["worst"]), int(state["count"])
        pairs = zip(state["index"].tolist(), state["value"].tolist(), strict=True)
        self.queue = deque(pairs)


class _Record:
    """What is kept of one task."""

    def __init__(self, windows: Sequence[int]) -> None:
        self.falls = [_Slide(w) for w in windows]
        self.rises = [_Slide(w) for w in windows]
        self.last = self.at_end = math.nan
        self.lowest = math.inf
        self.area_sum, self.area_count = 0.0, 0

    @property
    def seen(self) -> bool:
        return not math.isnan(self.last)

    def state(self) -> dict[str, Any]:
        # Tensors rather than numbers: they keep NaN and infinity in any file format.
        numbers = [self.last, self.at_end, self.lowest, self.area_sum]
        return {
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "area_count": self.area_count,
            "falls": [s.state() for s in self.falls],
            "rises": [s.state() for s in self.rises],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.last, self.at_end, self.lowest, self.area_sum = state["numbers"].tolist()
        self.area_count = int(state["area_count"])
        for mine, saved in zip(
            self.falls + self.rises, state["falls"] + state["rises"], strict=True
        ):
            mine.load(saved)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


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
