"""The gallery of studies: one page a study and an index with all verdicts, from result files alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guywire.core.errors import DataError, need
from guywire.lab.report.page import (
    Cell,
    Code,
    Column,
    Figure,
    Notice,
    Page,
    Prose,
    Section,
    Table,
    write_page,
)
from guywire.lab.report.palette import series

__all__ = ["index_page", "read_results", "study_page", "write"]

Result = Mapping[str, Any]

_MARKS = {
    "reproduced": "✓ reproduced",
    "not reproduced": "✗ not reproduced",
    "inconclusive": "? inconclusive",
    "smoke": "– smoke",
}
_FOOTER = (
    "Written by guywire from the result files alone. Means are over seeds; intervals are 95% bootstrap "
    "intervals, which with few seeds are too narrow: the rules ask for the sign in every seed too."
)


def write(folder: Path) -> Path:
    """Write ``index.html`` and a page for every result below a folder.

    Args:
        folder: of results, as ``guywire study`` leaves them: ``<slug>/<size>/result.json``.

    Returns:
        The index.

    Raises:
        DataError: there is no result, or one is damaged.
        MissingExtraError: jinja2 (extra ``report``) is not installed.
        CheckpointError: a page cannot be written.
    """
    need("jinja2", extra="report")
    results = read_results(folder)
    for result in results:
        write_page(study_page(result), folder / _name(result))
    return write_page(index_page(results), folder / "index.html")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the results below a folder; smoke results only of studies that have no other.

    Args:
        folder: of results.

    Returns:
        The results, by slug, full size before custom before smoke.

    Raises:
        DataError: there is no result, or one is damaged.
    """
    order = {"full": 0, "custom": 1, "smoke": 2}
    results = []
    for path in folder.glob("*/*/result.json"):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            known = result["format"] == 1 and result["size"] in order
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"the result {path} is damaged: run that study again") from error
        if not known:
            raise DataError(f"the result {path} is of another version: run that study again")
        results.append(result)
    if not results:
        raise DataError(
            f"there is no result below {folder}: run a study first, with --out {folder}"
        )
    full = {r["slug"] for r in results if r["size"] != "smoke"}
    kept = [r for r in results if r["size"] != "smoke" or r["slug"] not in full]
    return sorted(kept, key=lambda r: (r["slug"], order[r["size"]]))


def index_page(results: Sequence[Result]) -> Page:
    """Make the index: every study with every claim and its verdict.

    Args:
        results: from :func:`read_results`.

    Returns:
        The page.
    """
    claims = [claim for result in results for claim in result["claims"]]
    rows = tuple(
        (
            Cell(f"{result['slug']}{_suffix(result)}", href=_name(result)),
            Cell(claim["name"]),
            Cell(_MARKS[claim["verdict"]]),
            Cell(claim["allows"]),
        )
        for result in results
        for claim in result["claims"]
    )
    table = Table(
        "Every claim and what the numbers allow",
        (Column("study"), Column("claim"), Column("verdict"), Column("the numbers allow")),
        rows,
        sortable=True,
    )
    costs = [result["cost"]["wall_seconds"] for result in results]
    return Page(
        title="Does the paper's claim come out?",
        kicker="guywire study --report",
        headline=_finding(claims),
        remarks=("Each rule was written into its study before the numbers existed.",),
        facts=(
            ("Studies", str(len({r["slug"] for r in results}))),
            ("Claims", str(len(claims))),
            ("Computing", _minutes(sum(costs))),
        ),
        notices=_index_notices(results),
        sections=(
            Section("verdicts", "Verdicts", (table,)),
            Section(
                "studies",
                "Studies",
                tuple(
                    Prose(f"{r['slug']}: {r['title']} ({r['paper']}). {r['summary']}")
                    for r in results
                ),
            ),
        ),
        footer=_FOOTER,
    )


def study_page(result: Result) -> Page:
    """Make the page of one study.

    Args:
        result: from :func:`read_results`.

    Returns:
        The page.
    """
    conditions = list(dict.fromkeys(s["condition"] for s in result["statistics"]))
    plotted = [c for plot in result["plots"] for c in plot["conditions"]]
    marks = series(dict.fromkeys([*plotted, *conditions]))
    figures = [f for plot in result["plots"] if (f := _figure(plot, result, marks)) is not None]
    sections = [Section("claims", "Claims and verdicts", _claims(result))]
    if figures:
        sections.append(Section("plots", "What was measured", tuple(figures)))
    sections.append(Section("numbers", "Numbers", _numbers(result, conditions, marks)))
    sections.append(Section("again", "How to run it again", _again(result)))
    cost, machine = result["cost"], result["machine"]
    facts = (
        ("Paper", result["paper"]),
        ("Size", result["size"]),
        ("Seeds", str(len(result["seeds"]))),
        ("Computing", f"{_minutes(cost['wall_seconds'])} ({cost['units']} units)"),
        ("Memory", f"{cost['peak_memory_mb']:.0f} MB a process"),
        ("Machine", f"{machine.get('processor', machine['system'])}, {machine['cores']} cores"),
        ("Finished", result["finished"][:10]),
    )
    return Page(
        title=result["title"],
        kicker=f"guywire study {result['slug']}{_suffix(result)}",
        headline=_finding(result["claims"]),
        remarks=(result["summary"],),
        facts=facts,
        notices=_notices(result),
        sections=tuple(sections),
        footer=_FOOTER,
        back=("All studies", "index.html"),
    )


def _finding(claims: Sequence[Result]) -> str:
    count = Counter(claim["verdict"] for claim in claims)
    if count["smoke"] == len(claims):
        return "Smoke size: everything ran, and nothing is claimed."
    parts = [
        f"{count[verdict]} {words}"
        for verdict, words in (
            ("reproduced", "came out"),
            ("not reproduced", "did not"),
            ("inconclusive", "stayed open"),
            ("smoke", "ran in smoke size only"),
        )
        if count[verdict]
    ]
    noun = "claim" if len(claims) == 1 else "claims"
    return f"Of {len(claims)} {noun} " + ", ".join(parts) + "."


def _claims(result: Result) -> tuple[Table | Prose, ...]:
    rows = tuple(
        (
            Cell(claim["name"], detail=_MARKS[claim["verdict"]]),
            Cell(claim["says"], detail=f"Rule: {claim['rule']}"),
            Cell(claim["allows"]),
        )
        for claim in result["claims"]
    )
    columns = (Column("claim"), Column("the paper says"), Column("the numbers allow"))
    notes = tuple(Prose(note) for note in result["notes"])
    return (Table("Claims, rules and verdicts", columns, rows), *notes)


def _figure(plot: Result, result: Result, marks: Mapping[str, int]) -> Figure | None:
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


def _numbers(
    result: Result, conditions: Sequence[str], marks: Mapping[str, int]
) -> tuple[Table | Prose, ...]:
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


def _again(result: Result) -> tuple[Code | Table, ...]:
    # --set takes TOML values, and of these JSON's scalars and lists are all that settings hold.
    replaced = "".join(
        f" --set '{key}={json.dumps(value)}'" for key, value in result["overrides"].items()
    )
    flags = " --smoke" if result["size"] == "smoke" else ""
    command = f"guywire study {result['slug']}{flags} --seeds {len(result['seeds'])}{replaced}"
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


def _notices(result: Result) -> tuple[Notice, ...]:
    notices = []
    if result["size"] == "smoke":
        notices.append(Notice("Smoke size: these numbers show that everything runs, nothing else."))
    if result["size"] == "custom":
        changed = tuple(f"{key} = {value!r}" for key, value in result["overrides"].items())
        notices.append(Notice("Some settings are not those of the study:", changed))
    failed = tuple(check["says"] for check in result["checks"] if not check["holds"])
    if failed:
        notices.append(Notice("A check of the study itself failed, so nothing is claimed:", failed))
    stuck = tuple(c["name"] for c in result["choices"] if c["on_edge"] and not c["plateau"])
    if stuck:
        notices.append(Notice("Still at the edge of their grids, after widening:", stuck))
    return tuple(notices)


def _index_notices(results: Sequence[Result]) -> tuple[Notice, ...]:
    smoke = tuple(r["slug"] for r in results if r["size"] == "smoke")
    return (Notice("Only in smoke size, so without verdicts:", smoke),) if smoke else ()


def _edge(choice: Result) -> str:
    words = [f"widened {choice['widened']} times" if choice["widened"] != 1 else "widened once"]
    if not choice["widened"]:
        words = ["as it was"]
    if choice["plateau"]:
        words.append("flat at its edge")
    elif choice["on_edge"]:
        words.append("best still at its edge")
    return ", ".join(words)


def _name(result: Result) -> str:
    return (
        f"{result['slug']}.html" if result["size"] != "custom" else f"{result['slug']}-custom.html"
    )


def _suffix(result: Result) -> str:
    return "" if result["size"] == "full" else f" ({result['size']})"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _value(entry: Result) -> str:
    return _short(entry["mean"])


def _span(entry: Result) -> str:
    if entry["low"] is None or entry["high"] is None:
        return ""
    return f"{entry['low']:.4g} to {entry['high']:.4g}"
