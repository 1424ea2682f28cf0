"""The report's section on a sweep: what each strength did on validation data, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from guywire.core.errors import DataError
from guywire.lab.report import figures
from guywire.lab.report.page import Cell, Column, Figure, Prose, Section, Table
from guywire.lab.report.read import Run
from guywire.lab.report.verdict import join, percent

__all__ = ["sweep"]

_SAMPLERS = {
    "grid": "all values of a grid",
    "random": "values drawn at random",
    "tpe": "values suggested by Optuna's tree-structured Parzen estimator",
}
_LEVELS = {"low": "lowest", "high": "highest"}


def sweep(run: Run, marks: Mapping[str, int]) -> Section | None:
    """Make the section; None when nothing was tuned.

    Args:
        run: with the content of ``sweep.json``.
        marks: method to series.

    Returns:
        The section.

    Raises:
        DataError: ``sweep.json`` lacks what it should have.
    """
    if not run.sweep:
        return None
    try:
        return _section(run.sweep, marks)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise DataError(
            f"the sweep.json of the run {run.name!r} is not what a sweep writes "
            f"({type(error).__name__}: {error}): delete it and go on with --resume"
        ) from error


def _section(found: Mapping[str, Any], marks: Mapping[str, int]) -> Section:
    metric = str(found["metric"]).replace("_", " ")
    panels, rows, chosen = [], [], []
    for entry in found["methods"]:
        series = marks.get(entry["method"], 0)
        chosen.append(_choice(entry, series))
        rows += [_row(entry, trial, series) for trial in entry["trials"]]
        panels += [_response(entry, option, series) for option in entry["options"]]
    seeds = ", ".join(str(seed) for seed in found["seeds"])
    best = "lowest" if found["minimised"] else "highest"
    lead = (
        f"Before the comparison, {_SAMPLERS.get(found['sampler'], found['sampler'])} were tried on the "
        f"validation data of the tasks, with seeds ({seeds}) that the comparison does not use; no test data "
        f"were seen. What had the {best} {metric} in the mean over these seeds is what the comparison ran with."
    )
    blocks: list[Any] = [
        Table(
            "What was chosen",
            (
                Column("Method"),
                Column("Chosen"),
                Column("Tried", True, "values"),
                Column(metric.capitalize(), True, "% of validation"),
                Column("At the edge"),
            ),
            tuple(chosen),
        )
    ]
    edges = [entry["method"] for entry in found["methods"] if entry["edges"]]
    if edges:
        blocks.append(
            Prose(
                f"For {join(edges)} the best value is at the edge of what was tried: better ones may lie "
                "beyond it, so a wider range is worth a try."
            )
        )
    if found["not_tuned"]:
        blocks.append(Prose(f"Not tuned: {join(found['not_tuned'])}."))
    caption = (
        "On validation data. Marks are means over seeds, small dots single seeds; the dotted upright and the larger "
        "marks are the value chosen. A strength too low forgets, one too high does not learn: accuracy falls on both sides."
    )
    if any(trial["score"] is None for entry in found["methods"] for trial in entry["trials"]):
        caption += " A cross is a value with which training diverged for at least one seed."
    columns = (
        Column("Method"),
        Column("Values"),
        Column("Accuracy", True, "%"),
        Column("Forgetting", True, "points"),
        Column("Remark"),
    )
    table = Table("Every value tried, mean over seeds", columns, tuple(rows))
    blocks.append(Figure("", figures.responses(panels), caption, table))
    return Section("sweep", "How strengths were chosen", tuple(blocks), lead)


def _choice(entry: Mapping[str, Any], series: int) -> tuple[Cell, ...]:
    words = ", ".join(f"{name} = {_plain(value)}" for name, value in entry["chosen"].items())
    edges = [f"{name}: the {_LEVELS[edge]} tried" for name, edge in entry["edges"].items()]
    return (
        Cell(entry["method"], series=series),
        Cell(words),
        Cell(str(len(entry["trials"])), sort=len(entry["trials"])),
        Cell(percent(entry["score"]), sort=entry["score"]),
        Cell("; ".join(edges) or "no"),
    )


def _row(entry: Mapping[str, Any], trial: Mapping[str, Any], series: int) -> tuple[Cell, ...]:
    remark = "chosen" if trial["number"] == entry["best"] else ""
    if trial["score"] is None:
        lost = [seed for seed in trial["seeds"] if "error" in seed]
        remark = f"diverged with {len(lost)} of {len(trial['seeds'])} seeds" if lost else "unknown"
    cells = []
    for name in ("accuracy", "forgetting"):
        values = _shares(trial, name)
        mean = math.fsum(values) / len(values) if values else None
        cells.append(Cell("–" if mean is None else f"{100 * mean:.1f}", sort=mean))
    words = ", ".join(f"{name} = {_plain(value)}" for name, value in trial["values"].items())
    return (Cell(entry["method"], series=series), Cell(words), *cells, Cell(remark))


def _response(entry: Mapping[str, Any], option: Mapping[str, Any], series: int) -> figures.Response:
    name = option["name"]
    doses = [
        figures.Dose(
            _value(trial["values"][name]),
            () if trial["score"] is None else _shares(trial, "accuracy"),
            () if trial["score"] is None else _shares(trial, "forgetting"),
            trial["number"] == entry["best"],
        )
        for trial in entry["trials"]
    ]
    if not any(isinstance(d.value, str) for d in doses):
        doses.sort(key=lambda d: float(d.value))
    best = next(d for d in doses if d.chosen)
    edge = entry["edges"].get(name)
    note = f"best {_plain(best.value)}" + (f", the {_LEVELS[edge]} tried" if edge else "")
    means = {
        k: f"{k} {100 * math.fsum(v) / len(v):.1f}%"
        for k, v in (("accuracy", best.accuracy), ("forgetting", best.forgetting))
        if v
    }
    summary = (
        f"{entry['method']}: accuracy and forgetting on validation data against {name}, "
        f"{len(doses)} values from {_plain(doses[0].value)} to {_plain(doses[-1].value)}. "
        f"Chosen: {_plain(best.value)} ({', '.join(means.values())})"
        + (f", the {_LEVELS[edge]} value tried." if edge else ".")
    )
    return figures.Response(
        entry["method"],
        name,
        series,
        doses,
        bool(option.get("log")),
        len(entry["options"]) == 1,
        note,
        summary,
    )


def _shares(trial: Mapping[str, Any], name: str) -> Sequence[float]:
    values = [seed.get(name) for seed in trial["seeds"]]
    return tuple(float(v) for v in values if v is not None and math.isfinite(v))


def _value(value: Any) -> float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number else str(value)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
