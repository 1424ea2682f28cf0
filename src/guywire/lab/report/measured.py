"""Figures and tables of a study's page, from its result file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from guywire.lab.report.page import Cell, Code, Column, Figure, Prose, Table
from guywire.lab.report.palette import LIGHT, series

__all__ = ["again", "figure", "marks_of", "numbers"]

Result = Mapping[str, Any]


def marks_of(plots: Sequence[Result], conditions: Sequence[str]) -> dict[str, int]:
    """Give conditions their colours and shapes: the same in all plots, different within each.

    Args:
        plots: as the result file describes them.
        conditions: all that there are.

    Returns:
        Condition to series. In a plot two share one only if it has more conditions than there are
        series, or if earlier plots, which did not show both, gave them the same.
    """
    marks: dict[str, int] = {}
    for names in [*(plot["conditions"] or conditions for plot in plots), conditions]:
        wishes = series(names)
        used = {marks[name] for name in names if name in marks}
        free = [index for index in range(len(LIGHT)) if index not in used]
        for name in (name for name in names if name not in marks):
            marks[name] = wishes[name] if wishes[name] in free or not free else free[0]
            if marks[name] in free:
                free.remove(marks[name])
    return marks


def figure(plot: Result, result: Result, marks: Mapping[str, int]) -> Figure | None:
    """Draw one of the plots that a study asked for.

    Args:
        plot: as the result file describes it.
        result: the whole result.
        marks: condition to series.

    Returns:
        The figure; ``None`` where nothing of it was measured.
    """
    from guywire.lab.report.figures.measures import dots, scatter, tracks

    if plot["kind"] == "curves":
        curves = [c for c in result["curves"] if c["metric"] == plot["metric"]]
        items = [_track(c, marks) for c in _ordered(curves, plot["conditions"])]
        if not items:
            return None
        body = tracks(
            items,
            x_title=plot["against"] or "step",
            y_title=plot["label"],
            summary=f"{plot['title']}: {plot['label']}, for {', '.join(t.label for t in items)}.",
            log=plot["log"],
        )
        return Figure(plot["title"], body, plot["caption"])
    mine = [
        s for s in result["statistics"] if s["metric"] == plot["metric"] and s["mean"] is not None
    ]
    mine = _ordered(mine, plot["conditions"])
    if plot["kind"] == "plane":
        across = {
            s["condition"]: s
            for s in result["statistics"]
            if s["metric"] == plot["against"] and s["mean"] is not None
        }
        pairs = [
            (_measure(across[s["condition"]], marks), _measure(s, marks))
            for s in mine
            if s["condition"] in across
        ]
        if not pairs:
            return None
        x_title = plot.get("across") or plot["against"]
        summary = f"{plot['title']}: " + "; ".join(
            f"{x.label} {x_title} {x.words()}, {plot['label']} {y.words()}" for x, y in pairs
        )
        body = scatter(pairs, x_title=x_title, y_title=plot["label"], summary=summary)
        return Figure(plot["title"], body, plot["caption"])
    if not mine:
        return None
    return Figure(
        plot["title"], dots(plot["label"], [_measure(s, marks) for s in mine]), plot["caption"]
    )


def _ordered(entries: Sequence[Result], conditions: Sequence[str]) -> list[Result]:
    if not conditions:
        return list(entries)
    by_name = {entry["condition"]: entry for entry in entries}
    return [by_name[name] for name in conditions if name in by_name]


def _measure(entry: Result, marks: Mapping[str, int]) -> Any:
    from guywire.lab.report.figures.measures import Measure

    seeds = [value for value in entry["values"].values() if value is not None]
    name = entry["condition"]
    return Measure(name, marks[name], entry["mean"], entry["low"], entry["high"], seeds)


def _track(curve: Result, marks: Mapping[str, int]) -> Any:
    from guywire.lab.report.figures.measures import Track

    name = curve["condition"]
    mean = [float("nan") if value is None else value for value in curve["mean"]]
    return Track(name, marks.get(name, 0), curve["steps"], mean, curve["low"], curve["high"])


def numbers(
    result: Result, conditions: Sequence[str], marks: Mapping[str, int]
) -> tuple[Table | Prose, ...]:
    """Set all numbers in tables: differences, chosen strengths, then every metric, folded.

    Args:
        result: the whole result.
        conditions: in their order.
        marks: condition to series.

    Returns:
        The tables.
    """
    blocks: list[Table | Prose] = []
    if result["differences"]:
        blocks.append(
            Table(
                "Differences that the rules asked for, paired over seeds",
                (
                    Column("first less second"),
                    Column("metric"),
                    Column("mean", True),
                    Column("seeds", True),
                ),
                tuple(
                    (
                        Cell(f"{d['first']} − {d['second']}"),
                        Cell(d["metric"]),
                        Cell(_value(d), detail=_span(d)),
                        Cell(", ".join(_short(v) for v in d["values"].values())),
                    )
                    for d in result["differences"]
                ),
            )
        )
    if result["choices"]:
        blocks.append(
            Table(
                "Strengths, chosen on validation data",
                (
                    Column("condition"),
                    Column("chosen", True),
                    Column("tried: score"),
                    Column("grid"),
                ),
                tuple(
                    (
                        Cell(c["name"], detail=f"by {c['metric']}, {c['better']} is better"),
                        Cell(f"{c['best']:g}"),
                        Cell(
                            ", ".join(
                                f"{g:g}: {_short(s)}"
                                for g, s in zip(c["grid"], c["scores"], strict=True)
                            )
                        ),
                        Cell(_edge(c)),
                    )
                    for c in result["choices"]
                ),
            )
        )
    for metric in dict.fromkeys(s["metric"] for s in result["statistics"]):
        mine = {s["condition"]: s for s in result["statistics"] if s["metric"] == metric}
        blocks.append(
            Table(
                metric,
                (Column("condition"), Column("mean", True), Column("seeds", True)),
                tuple(
                    (
                        Cell(name, series=marks[name]),
                        Cell(_value(mine[name]), detail=_span(mine[name]), sort=mine[name]["mean"]),
                        Cell(", ".join(_short(v) for v in mine[name]["values"].values())),
                    )
                    for name in conditions
                    if name in mine
                ),
                sortable=True,
                folded=True,
            )
        )
    return tuple(blocks)


def again(result: Result) -> tuple[Code | Table, ...]:
    """Set the command that runs the study again, its checks, settings and versions.

    Args:
        result: the whole result.

    Returns:
        The blocks.
    """
    # --set takes TOML values, and of these JSON's scalars and lists are all that settings hold.
    replaced = "".join(
        f" --set '{key}={json.dumps(value)}'" for key, value in result["overrides"].items()
    )
    flags = " --smoke" if result["size"] == "smoke" else ""
    called = shlex.quote(result.get("called", result["slug"]))  # a study's own file, or its slug
    command = f"guywire study {called}{flags} --seeds {len(result['seeds'])}{replaced}"
    versions = "\n".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = json.dumps(result["settings"], indent=2, ensure_ascii=False)
    checks = Table(
        "Checks of the study itself",
        (Column("what must hold at any size"), Column("holds")),
        tuple((Cell(c["says"]), Cell("yes" if c["holds"] else "NO")) for c in result["checks"]),
    )
    return (
        Code("The command", command),
        *([checks] if result["checks"] else []),
        Code("Settings", settings, folded=True),
        Code("Versions", versions, folded=True),
    )


def _edge(choice: Result) -> str:
    words = [f"widened {choice['widened']} times" if choice["widened"] != 1 else "widened once"]
    if not choice["widened"]:
        words = ["as it was"]
    if choice["plateau"]:
        words.append("flat at its edge")
    elif choice["on_edge"]:
        words.append("best still at its edge")
    return ", ".join(words)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _value(entry: Result) -> str:
    return _short(entry["mean"])


def _span(entry: Result) -> str:
    if entry["low"] is None or entry["high"] is None:
        return ""
    return f"{entry['low']:.4g} to {entry['high']:.4g}"
