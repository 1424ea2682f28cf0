"""The sections of the report of a comparison, each from a run and its measures."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guywire.lab.report import figures
from guywire.lab.report.page import (
    Cell,
    Code,
    Column,
    Figure,
    Picture,
    Pictures,
    Prose,
    Section,
    Table,
    data_uri,
)
from guywire.lab.report.read import Run, TaskFacts, Trial
from guywire.lab.report.stats import interval
from guywire.lab.report.tables import MAIN, MEASURES, Summaries, measures_table, number, plain
from guywire.lab.report.traces import borders, lines, shown_tasks
from guywire.lab.report.verdict import is_ceiling, join, percent

__all__ = ["again", "cost", "curves", "matrices", "mean_matrix", "plane", "samples", "summary"]

Marks = Mapping[str, int]


def summary(run: Run, order: Sequence[str], found: Summaries, marks: Marks) -> Section:
    """The table of methods by measures, with what the measures mean."""
    note = (
        "Forgetting: how much accuracy a task lost between the moment it was learnt and the end, mean over "
        "tasks (less is better). min-ACC: the worst accuracy that each earlier task fell to at any step, mean "
        "over tasks. WC-ACC: the same together with the last task, a lower bound of the average accuracy at the end."
    )
    table = measures_table(
        "Mean over seeds, with its 95% interval (Student's t) below",
        run,
        order,
        found,
        marks,
        (*MAIN, "seconds", "extra_memory_mb"),
        note=note,
    )
    rest = [n for n, *_ in MEASURES if n not in {*MAIN, "seconds", "extra_memory_mb"}]
    blocks: list[Any] = [table]
    if any(n in found[m] for m in order for n in rest):
        blocks.append(
            measures_table(
                "Further measures",
                run,
                order,
                found,
                marks,
                rest,
                note=(
                    "WF and WP: the largest loss and the largest gain of accuracy inside a window "
                    "of 10 or 100 evaluations, mean over tasks."
                ),
                folded=True,
            )
        )
    return Section("summary", "Summary", tuple(blocks))


def plane(run: Run, order: Sequence[str], found: Summaries, marks: Marks) -> Section | None:
    """Accuracy of the final model against forgetting; None when no method has both."""
    points, ceiling = [], None
    for m in order:
        accuracy, forgetting = found[m].get("accuracy"), found[m].get("forgetting")
        if accuracy and is_ceiling(m):
            ceiling = (f"{m}: the ceiling", marks[m], accuracy.scaled(100))
        elif accuracy and forgetting:
            pairs = [(t.metric("forgetting"), t.metric("accuracy")) for t in run.of(m)]
            seeds = tuple((100 * a, 100 * b) for a, b in pairs if a is not None and b is not None)
            points.append(
                figures.Point(m, marks[m], forgetting.scaled(100), accuracy.scaled(100), seeds)
            )
    if not points:
        return None
    summary = "Final accuracy against forgetting. " + " ".join(
        f"{p.label}: accuracy {p.y.mean:.1f}%, forgetting {p.x.mean:.1f} points." for p in points
    )
    if ceiling:
        summary += f" {ceiling[0]}, accuracy {ceiling[2].mean:.1f}%."
    body = figures.plane(
        points,
        x_title="Forgetting, points (less is better)",
        y_title="Accuracy of the final model, %",
        summary=summary,
        ceiling=ceiling,
    )
    figure = Figure(
        "",
        body,
        "A large mark is the mean over seeds, small dots are single seeds, arms are 95% intervals (cut where "
        "they would leave the picture). Best is up and to the left: accurate, and nothing lost.",
        measures_table(
            "Accuracy and forgetting", run, order, found, marks, ("accuracy", "forgetting")
        ),
    )
    return Section(
        "plane",
        "Accuracy against forgetting",
        (figure,),
        "A method can forget little because it holds well, or because it never learnt much. The plane shows which.",
    )


def mean_matrix(trials: Sequence[Trial]) -> list[list[float | None]]:
    """The accuracy matrix, cell by cell the mean over the seeds that have it."""
    matrices = [t.matrix for t in trials]
    size = max((len(m) for m in matrices), default=0)
    width = max((len(r) for m in matrices for r in m), default=0)
    return [[_cell(matrices, i, j) for j in range(width)] for i in range(size)]


def _cell(matrices: Sequence[Sequence[Sequence[float | None]]], i: int, j: int) -> float | None:
    values = [m[i][j] for m in matrices if i < len(m) and j < len(m[i])]
    found = interval(values)
    return None if found is None else found.mean


def matrices(run: Run, order: Sequence[str], marks: Marks) -> Section:
    """Accuracy matrices, one a method, mean over seeds."""
    items, rows = [], []
    for m in order:
        values = mean_matrix(run.of(m))
        items.append(figures.Matrix(m, marks[m], values))
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value is None:
                    continue
                spread = interval(
                    t.matrix[i][j] for t in run.of(m) if i < len(t.matrix) and j < len(t.matrix[i])
                )
                rows.append(
                    (
                        Cell(m, series=marks[m]),
                        Cell(str(i + 1)),
                        Cell(str(j + 1)),
                        number(spread, True),
                    )
                )
    size = max(
        (max(len(i.values), *(len(r) for r in i.values)) for i in items if i.values), default=0
    )
    names = [str(k + 1) for k in range(size)]
    body = figures.matrices(items, names, rows="after training on", columns="accuracy on")
    columns = (
        Column("Method"),
        Column("Trained through task", True),
        Column("Evaluated on task", True),
        Column("Accuracy", True, "%"),
    )
    figure = Figure(
        "",
        body,
        "A row is the model after it was trained through that task, a column the test data of a task; mean over "
        "seeds, per cent. The diagonal is what was learnt; reading down a column shows what became of it.",
        Table("Accuracy matrices, mean over seeds with 95% interval", columns, tuple(rows)),
    )
    return Section("matrices", "What became of each task", (figure,))


def curves(run: Run, order: Sequence[str], found: Summaries, marks: Marks) -> Section:
    """Accuracy at every evaluated step, one panel a method, with the lowest points as a table."""
    methods = [*order, *(m for m in run.methods if m not in order)]
    methods = [m for m in methods if any(t.curves for t in run.trials if t.method == m)]
    tasks = shown_tasks(run.trials)
    choices = [f"Task {k + 1}" for k in tasks] + (["Mean of tasks seen"] if len(tasks) > 1 else [])
    panels, rows = [], []
    for m in methods:
        trials = [t for t in run.trials if t.method == m and t.curves]
        drawn = lines(trials, tasks)
        edges = borders(trials)
        low = found.get(m, {}).get("min_acc")
        note = f"min-ACC {percent(low.mean)}" if low else ""
        panels.append(figures.Panel(m, marks[m], drawn, edges, note))
        rows += [(Cell(m, series=marks[m]), *row) for row in _dips(drawn, tasks, edges)]
    body = figures.panels(panels, choices, name="curve", question="Accuracy on the test data of")
    columns = (
        Column("Method"), Column("Task", True), Column("Right after it was learnt", True, "%"),
        Column("Lowest later", True, "%"), Column("At step", True), Column("At the end", True, "%"),
    )  # fmt: skip
    figure = Figure(
        "",
        body,
        "Bold: mean over seeds. Faint: single seeds. Every task has the same width; it begins at a dotted line. A sharp drop right after "
        "such a line that is won back later is the stability gap; evaluation at the ends of tasks alone would miss it. "
        "min-ACC is the mean, over earlier tasks, of the lowest point.",
        Table("Lowest points of the mean curves", columns, tuple(rows)),
    )
    return Section("curves", "On the way there", (figure,))


def _dips(
    drawn: Sequence[figures.Line], tasks: Sequence[int], edges: Sequence[float]
) -> list[tuple[Cell, ...]]:
    rows = []
    for line in drawn:
        if not line.main or line.key >= len(tasks) or tasks[line.key] + 1 >= len(edges) - 1:
            continue
        task = tasks[line.key]
        learnt = np.searchsorted(line.x, edges[task + 1], side="right")
        if not 0 < learnt < len(line.x):
            continue
        at = learnt + int(line.y[learnt:].argmin())
        values = (line.y[learnt - 1], line.y[at], line.y[-1])
        start, low, end = (Cell(percent(float(v)), sort=float(v)) for v in values)
        rows.append((Cell(str(task + 1)), start, low, Cell(f"{line.x[at]:g}"), end))
    return rows


def cost(order: Sequence[str], found: Summaries, marks: Marks) -> Section:
    """Seconds and megabytes of each method."""

    def panel(name: str, title: str, unit: str) -> Any:
        items = []
        for m in order:
            value = found[m].get(name)
            words = "not measured" if value is None else f"{plain(value.mean)} {unit}"
            items.append(figures.Bar(m, marks[m], value, words))
        return figures.bars(title, items)

    rows = tuple(
        (
            Cell(m, series=marks[m]),
            number(found[m].get("seconds"), False),
            number(found[m].get("extra_memory_mb"), False),
        )
        for m in order
    )
    body = panel("seconds", "Time of one trial, seconds", "s") + panel(
        "extra_memory_mb", "Extra memory, MB", "MB"
    )
    figure = Figure(
        "",
        figures.element("div", body, class_="bars"),
        "Extra memory is what a method keeps beside the model and its optimiser: anchors, importances, a teacher, stored "
        "samples. The line on a bar is the 95% interval. Seconds depend on the machine and on what else ran beside the trial.",
        Table(
            "Cost",
            (Column("Method"), Column("Time", True, "seconds"), Column("Extra memory", True, "MB")),
            rows,
        ),
    )
    return Section("cost", "Cost", (figure,))


def samples(run: Run) -> Section:
    """A picture, or some texts, of each task."""
    cards = Pictures(tuple(_card(i, task) for i, task in enumerate(run.tasks)))
    notes = tuple(Prose(str(n)) for n in run.stream.get("notes") or ())
    lead = "What the stream shows, in the order in which it shows it."
    return Section("tasks", "The tasks", (cards, *notes), lead)


def _card(index: int, task: TaskFacts) -> Picture:
    title, most = f"Task {index + 1}", 12
    few = [*task.classes[:most]]
    if len(task.classes) > most:
        few.append(f"{len(task.classes) - most} more")
    named = f"Classes {join(few)}. " if few else ""
    name = task.name.lower().replace("-", " ")
    if name not in {f"task {index}", title.lower()}:
        title = f"{title}: {task.name}"
        if task.name == ", ".join(task.classes):
            named = ""  # the name says it
    sizes = ", ".join(f"{n:,} {kind}" for kind, n in task.sizes.items())
    detail = named + (f"{sizes[0].upper()}{sizes[1:]}." if sizes else "")
    alt = f"Sample images of task {index + 1}" + (f", classes {join(few)}" if few else "")
    source = data_uri(task.picture) if task.picture else ""
    return Picture(title, detail, source, alt, task.texts[:8])


def again(run: Run) -> Section:
    """The command, the resolved configuration, versions and machine."""
    command = run.info.get("command")
    blocks: list[Any] = []
    if command:
        words = command if isinstance(command, str) else shlex.join(str(c) for c in command)
        blocks.append(Code("The command that made this run:", words))
    blocks.append(
        Code(
            "The same run from its resolved configuration (save it as config.toml):",
            "guywire compare config.toml --out again",
        )
    )
    if run.config_text:
        blocks.append(Code("config.toml, as resolved", run.config_text, folded=True))
    rows = [*_flat(run.info.get("versions")), *_flat(run.info.get("machine"), "machine")]
    if rows:
        table = Table(
            "Versions and machine",
            (Column("What"), Column("Value")),
            tuple((Cell(a), Cell(b)) for a, b in rows),
        )
        blocks.append(table)
    return Section("again", "How to run it again", tuple(blocks))


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        pairs = [(f"{name} {k}".strip().replace("_", " "), v) for k, v in value.items()]
        return [row for key, v in pairs for row in _flat(v, key)]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))]
    return [] if value is None else [(name, str(value))]
