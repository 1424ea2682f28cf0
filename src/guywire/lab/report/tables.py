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
    words = percent if share else plain
    detail = ""
    if value.low is not None and value.high is not None:
        low, high = words(value.low), words(value.high)
        # What is the same for every seed (megabytes, say) needs no interval.
        detail = "" if not share and low == high else f"{low} to {high}"
    return Cell(words(value.mean), detail, value.mean)


def plain(value: float) -> str:
    """Two or three digits that mean something.

    >>> [plain(v) for v in (1234.5, 12.34, 0.123, 0.001, 0.0)]
    ['1234', '12.3', '0.12', '< 0.01', '0']
    """
    size = abs(value)
    if 0 < size < 0.005:
        return "< 0.01"
    text = f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return text if size else "0"


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
