"""The report of ``guywire compare``: from a run to a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from guywire.lab.report import sections
from guywire.lab.report.page import Notice, Page
from guywire.lab.report.palette import series
from guywire.lab.report.read import Run
from guywire.lab.report.stats import Interval
from guywire.lab.report.sweep import sweep
from guywire.lab.report.tables import Summaries, summarise
from guywire.lab.report.verdict import sentences

__all__ = ["compare_page"]


def compare_page(run: Run) -> Page:
    """Make the page of a run.

    Args:
        run: what `read_run` found.

    Returns:
        The page; `write_page` sets it.
    """
    found = summarise(run)
    done = [m for m in run.methods if run.of(m)]
    order = sorted(done, key=lambda m: -_mean(found[m].get("accuracy")))
    marks = series(run.methods)
    headline, remarks = _finding(order, found)
    made = []
    if order:
        made.append(sections.summary(run, order, found, marks))
        made.append(sections.plane(run, order, found, marks))
        made.append(sections.matrices(run, order, marks))
    if any(t.curves for t in run.trials):
        made.append(sections.curves(run, order, found, marks))
    if order:
        made.append(sections.cost(order, found, marks))
    made.append(sweep(run, marks))
    if run.tasks:
        made.append(sections.samples(run))
    made.append(sections.again(run))
    return Page(
        title=_title(run),
        kicker="guywire compare",
        headline=headline,
        remarks=remarks,
        facts=_facts(run),
        notices=_notices(run),
        sections=tuple(s for s in made if s is not None),
        footer=(
            "Written by guywire from the files of the run's directory alone. Means are over seeds; "
            "intervals are 95% intervals of Student's t over seeds."
        ),
    )


def _mean(value: Interval | None) -> float:
    return -math.inf if value is None else value.mean


def _finding(order: Sequence[str], found: Summaries) -> tuple[str, tuple[str, ...]]:
    def column(name: str) -> dict[str, Interval]:
        return {m: found[m][name] for m in order if name in found[m]}

    if not order:
        return "No trial has finished yet, so there is nothing to compare.", ()
    return sentences(column("forgetting"), column("accuracy"), column("learning_accuracy"))


def _title(run: Run) -> str:
    name = str(run.stream.get("name") or "a stream")
    scenario = run.stream.get("scenario")
    start = f"{str(scenario).capitalize()}-incremental {name}" if scenario else f"Stream {name}"
    return f"{start}, {len(run.tasks)} tasks" if run.tasks else start


def _facts(run: Run) -> tuple[tuple[str, str], ...]:
    done = [t for t in run.trials if t.status == "done"]
    seeds = sorted({t.seed for t in run.trials if t.seed is not None})
    facts = [
        ("Model", run.config.get("model") or run.info.get("model")),
        ("Methods", str(len(run.methods))),
        (
            "Seeds",
            f"{len(seeds)} ({', '.join(map(str, seeds))})" if len(seeds) <= 6 else str(len(seeds)),
        ),
        ("Trials finished", f"{len(done)} of {len(run.trials)}"),
        ("Classes", str(len(run.stream["class_names"])) if run.stream.get("class_names") else None),
        (
            "Training samples",
            f"{sum(t.sizes.get('train', 0) for t in run.tasks):,}" if run.tasks else None,
        ),
        ("Took", _took(run.info)),
        ("Started", _when(run.info.get("started"))),
    ]
    return tuple((name, str(value)) for name, value in facts if value)


def _moment(value: Any) -> datetime | None:
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value)
        return datetime.fromisoformat(str(value))
    except (ValueError, OverflowError, OSError):
        return None


def _when(value: Any) -> str | None:
    moment = _moment(value)
    return moment.strftime("%Y-%m-%d %H:%M") if moment else None


def _took(info: Mapping[str, Any]) -> str | None:
    start, end = _moment(info.get("started")), _moment(info.get("finished"))
    if start is None or end is None or (start.tzinfo is None) != (end.tzinfo is None):
        return None
    seconds = max((end - start).total_seconds(), 0.0)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _notices(run: Run) -> tuple[Notice, ...]:
    notices = []
    lost = [t for t in run.trials if t.status == "failed"]
    open_ = [t for t in run.trials if t.status in {"unfinished", "missing"}]
    total = len(run.trials)
    if lost:
        words = f"{len(lost)} of {total} trials failed; the numbers below are without {'it' if len(lost) == 1 else 'them'}."
        notices.append(Notice(words, tuple(f"{t.name}: {t.note}" for t in lost)))
    if open_:
        words = f"This run is not finished: {len(open_)} of {total} trials {'has' if len(open_) == 1 else 'have'} no result; --resume goes on with it."
        notices.append(Notice(words, tuple(f"{t.name}: {t.note}" for t in open_)))
    status = str(run.info.get("status") or "")
    if status not in {"", "done", "finished", "complete", "completed", "ok"} and not notices:
        notices.append(Notice(f"The run's status is {status!r}, not done."))
    if not run.trials:
        notices.append(Notice("This run has no trials yet."))
    return tuple(notices)
