"""The stability metrics, updated one evaluation at a time; definitions in ``stability``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from guywire.core.errors import CheckpointError, UsageError
from guywire.diagnostics._sliding import Slide

__all__ = ["StabilityTracker"]


class StabilityTracker:
    """All stability metrics, updated one evaluation at a time.

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
            Slide(window)

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


class _Record:
    """What is kept of one task."""

    def __init__(self, windows: Sequence[int]) -> None:
        self.falls = [Slide(w) for w in windows]
        self.rises = [Slide(w) for w in windows]
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
