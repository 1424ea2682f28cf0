"""The protocol of trackers: one method, three events.

Events are made where the command was typed, from the files and results of trials that ended. So
workers and remote nodes need no tracker, and a resumed run tells each trial once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

__all__ = ["Began", "Ended", "Event", "Scalar", "Tracker", "TrialEnded"]

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Began:
    """A comparison began, or goes on.

    Attributes:
        run: an id of this comparison; the same when it is resumed.
        folder: the run's folder.
        params: its settings, with dotted names: ``stream.data``, ``epochs``.
    """

    run: str
    folder: Path
    params: Mapping[str, Scalar]


@dataclass(frozen=True)
class TrialEnded:
    """A trial ended well; each is told once, also over many resumptions.

    Attributes:
        run: the id of the comparison.
        folder: the run's folder.
        name: of the trial: ``ewc-seed0``.
        params: ``method``, ``seed``, and the options that were given for the method.
        curves: names to points ``(step, value)``: ``loss``, and ``accuracy/task-0`` for the
            accuracy on the first task while training went on.
        metrics: the numbers at the end: ``final/accuracy``, ``final/forgetting``, ...
    """

    run: str
    folder: Path
    name: str
    params: Mapping[str, Scalar]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Ended:
    """A comparison ended.

    Attributes:
        run: the id of the comparison.
        folder: the run's folder.
        status: ``done``, ``failed`` (some trials did) or ``interrupted``.
        metrics: means over seeds with the ends of their intervals: ``ewc/accuracy``,
            ``ewc/accuracy/low``, ``ewc/accuracy/high``.
        failed: names of trials to why they failed.
        files: what is worth keeping: the report, the table of results, the settings.
    """

    run: str
    folder: Path
    status: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()


Event = Began | TrialEnded | Ended


@runtime_checkable
class Tracker(Protocol):
    """Something that is told what happens. What it raises ends its telling, never the comparison."""

    def log(self, event: Event) -> None:
        """Take note of an event.

        Args:
            event: what happened; ``Began`` comes first, in every process that starts or resumes.
        """
