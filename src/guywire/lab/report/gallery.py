"""The gallery of studies: one page a study and an index with all verdicts, from result files alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guywire.core.errors import DataError, need
from guywire.lab.report.measured import again, figure, marks_of, numbers
from guywire.lab.report.page import (
    Cell,
    Column,
    Notice,
    Page,
    Prose,
    Section,
    Table,
    write_page,
)

__all__ = ["index_page", "read_results", "study_page", "write"]

Result = Mapping[str, Any]

_MARKS = {
    "reproduced": "✓ reproduced",
    "not reproduced": "✗ not reproduced",
    "inconclusive": "? inconclusive",
    "smoke": "smoke",
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
            Cell(f"{result['slug']}{_suffix(result)}", claim["name"], href=_name(result)),
            Cell(_MARKS[claim["verdict"]]),
            Cell(claim["allows"]),
        )
        for result in results
        for claim in result["claims"]
    )
    table = Table(
        "Every claim and what the numbers allow",
        (Column("study, claim"), Column("verdict"), Column("the numbers allow")),
        rows,
        sortable=True,
    )
    # Processor time adds up; the time on the clock does not where studies ran side by side.
    costs = [result["cost"]["cpu_seconds"] for result in results]
    return Page(
        title="Does the paper's claim come out?",
        kicker="guywire study --report",
        headline=_finding(claims),
        remarks=("Each rule was written into its study before the numbers existed.",),
        facts=(
            ("Studies", str(len({r["slug"] for r in results}))),
            ("Claims", str(len(claims))),
            ("Processor time", _minutes(sum(costs))),
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
    marks = marks_of(result["plots"], conditions)
    figures = [f for plot in result["plots"] if (f := figure(plot, result, marks)) is not None]
    sections = [_claim(number, claim) for number, claim in enumerate(result["claims"], start=1)]
    if figures:
        sections.append(Section("plots", "What was measured", tuple(figures)))
    sections.append(Section("numbers", "Numbers", numbers(result, conditions, marks)))
    if result["notes"]:
        notes = tuple(Prose(note) for note in result["notes"])
        sections.append(Section("notes", "Beside the paper", notes))
    sections.append(Section("again", "How to run it again", again(result)))
    cost, machine = result["cost"], result["machine"]
    facts = (
        ("Paper", result["paper"]),
        ("Size", result["size"]),
        ("Seeds", str(len(result["seeds"]))),
        ("Processor time", f"{_minutes(cost['cpu_seconds'])} ({cost['units']} units)"),
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


def _claim(number: int, claim: Result) -> Section:
    return Section(
        f"claim-{number}",
        f"{claim['name']} ({_MARKS[claim['verdict']]})",
        (Prose(f"Rule: {claim['rule']}"), Prose(f"The numbers allow: {claim['allows']}")),
        lead=f"The paper says: {claim['says']}",
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


def _name(result: Result) -> str:
    return (
        f"{result['slug']}.html" if result["size"] != "custom" else f"{result['slug']}-custom.html"
    )


def _suffix(result: Result) -> str:
    return "" if result["size"] == "full" else f" ({result['size']})"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
