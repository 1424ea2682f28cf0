"""Numbers as cells, and the tables of measures by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guywire.lab.report.page import Cell, Column, Table
from guywire.lab.report.read import Run
from guywire.lab.report.stats import Interval, interval
from guywire.lab.report.verdict import percent

__all__ = ["MAIN", "MEASURES", "Summaries", "measures_table", "number", "plain", "summarise"]

Summaries = Mapping[str, Mapping[str, Interval]]
"""Method to the name of a measure to its mean and interval over the finished seeds."""

# name, heading, hint, whether it is a share
MEASURES = (
    ("accuracy", "Accuracy", "all classes, %", True),
    ("average_accuracy", "Average accuracy", "mean of tasks, %", True),
    ("forgetting", "Forgetting", "points", True),
    ("backward_transfer", "Backward transfer", "points", True),
    ("learning_accuracy", "Learning accuracy", "right after a task, %", True),
    ("min_acc", "min-ACC", "%", True),
    ("wc_acc", "WC-ACC", "%", True),
    ("wf10", "WF¹⁰", "points", True),
    ("wp10", "WP¹⁰", "points", True),
    ("wf100", "WF¹⁰⁰", "points", True),
    ("wp100", "WP¹⁰⁰", "points", True),
    ("forgetting_global", "Global forgetting", "points", True),
    ("seconds", "Time", "seconds a trial", False),
    ("extra_memory_mb", "Extra memory", "MB", False),
)
MAIN = ("accuracy", "forgetting", "learning_accuracy", "min_acc", "wc_acc")


def summarise(run: Run) -> Summaries:
    """Mean and interval of every measure that the finished trials of a method have.

    Args:
        run: what was read.

    Returns:
        Method to measure to interval; a method without a finished trial has no measures.
    """
    found: dict[str, dict[str, Interval]] = {}
    for method in run.methods:
        trials = run.of(method)
        each = {name: interval(t.metric(name) for t in trials) for name, *_ in MEASURES}
        found[method] = {name: value for name, value in each.items() if value is not None}
    return found


def number(value: Interval | None, share: bool) -> Cell:
    """A mean with its interval as a cell; a share is written in per cent."""
    if value is None:
        return Cell("–", sort="")
    if share:
        detail = (
            ""
            if value.low is None or value.high is None
            else f"{percent(value.low)} to {percent(value.high)}"
        )
        return Cell(percent(value.mean), detail, value.mean)
    detail = (
        ""
        if value.low is None or value.high is None
        else f"{plain(value.low)} to {plain(value.high)}"
    )
    return Cell(plain(value.mean), detail, value.mean)


def plain(value: float) -> str:
    """Three digits that mean something."""
    size = abs(value)
    text = f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return text if float(text) else "0"


def measures_table(
    caption: str,
    run: Run,
    order: Sequence[str],
    found: Summaries,
    marks: Mapping[str, int],
    names: Sequence[str],
    *,
    note: str = "",
    folded: bool = False,
) -> Table:
    """Methods by some of the measures; a measure that no method has is left out."""
    wanted = [s for s in MEASURES if s[0] in names and any(s[0] in found[m] for m in order)]
    columns = [
        Column("Method"),
        *(Column(label, True, hint) for _, label, hint, _ in wanted),
        Column("Seeds", True),
    ]
    rows = tuple(
        (
            Cell(m, series=marks[m]),
            *(number(found[m].get(name), share) for name, _, _, share in wanted),
            Cell(str(len(run.of(m)))),
        )
        for m in order
    )
    return Table(caption, tuple(columns), rows, sortable=True, note=note, folded=folded)
