"""Tables from a run's JSON: for the terminal, and for the page "What it costs"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["put", "section", "table"]

START = "<!-- bench: made by `python -m benchmarks --page`; edit nothing below -->"
END = "<!-- bench: end -->"


def number(value: float) -> str:
    """Two or three digits, whole numbers from 1000 on.

    >>> number(0.01234), number(2.3), number(1234.5), number(8.0e8)
    ('0.012', '2.30', '1234', '8.0e+08')
    """
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{max(digits, 3 if abs(value) < 0.1 else digits)}f}"


def measured(found: Mapping[str, Any] | None, unit: str = "") -> str:
    """A median with its range."""
    if found is None:
        return "–"
    said = number(found["median"])
    if found["low"] != found["high"]:
        said += f" [{number(found['low'])}, {number(found['high'])}]"
    return f"{said} {unit}".strip()


def cells(row: Mapping[str, Any]) -> list[str]:
    """A line's cells."""
    return [
        row["figure"],
        measured(row["ours"], row["unit"]),
        row["peer"] + (f": {measured(row['theirs'], row['unit'])}" if row["theirs"] else ""),
        measured(row["ratio"]),
        row["verdict"],
    ]


HEAD = ["figure", "ours", "beside", "ours / theirs", "verdict"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for the terminal."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD) - 1)]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for the page, notes below it."""
    notes: list[str] = []
    out = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for r in rows:
        line = [c.replace("|", "/") for c in cells(r)]
        if r["note"]:
            if r["note"] not in notes:
                notes.append(r["note"])
            line[0] += f" ({notes.index(r['note']) + 1})"
        if r["verdict"].startswith("we lose") or "missed" in r["verdict"]:
            line[-1] = f"**{line[-1]}**"
        out.append("| " + " | ".join(line) + " |")
    if notes:
        out += ["", *(f"({n}) {note}." for n, note in enumerate(notes, 1))]
        at = len(out) - len(notes)
        out[at:] = ["  \n".join(out[at:])]
    return "\n".join(out)


def losses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each line in which a peer is ahead or a limit is missed."""
    said = []
    for r in rows:
        if r["verdict"].startswith("we lose"):
            by = f", at {number(r['ratio']['median'])} times its cost" if r["ratio"] else ""
            note = f" ({r['note']})" if r["note"] else ""
            said.append(f"{r['figure']}, beside {r['peer']}{by}: {r['verdict']}{note}.")
        elif "missed" in r["verdict"]:
            value = measured(r["ours"], r["unit"])
            said.append(f"{r['figure']}: {value}, {r['verdict']}.")
    return said


def section(results: Mapping[str, Any], figures: Sequence[str] = ()) -> str:
    """The part of the page that a run makes."""
    rows, machine = results["rows"], results["machine"]
    peers = [
        r for r in rows if r["theirs"] or (r["ratio"] is None and r["group"] not in results["own"])
    ]
    own = [r for r in rows if r["group"] in results["own"]]
    packages: dict[str, str] = {}
    for side, found in results["versions"].items():
        for name, version in found.items():
            key = name if name != "torch" or side in ("guywire", "ours") else f"torch of {side}"
            packages[key] = version
    shared = packages.get("torch")
    packages = {
        k: v for k, v in packages.items()
        if not (k.startswith("torch of ") and v.split("+")[0] == str(shared).split("+")[0])
    }  # fmt: skip
    lost = losses(rows)
    out = [
        START,
        "",
        f"Measured on {results['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['system']}, Python {machine['python']}, {results['threads']} "
        f"thread{'s' * (results['threads'] != 1)} on every side; load at start {results['load']:.1f}. "
        f"{results['seconds'] / 60:.0f} minutes"
        + (
            ", **in the quick sizes, which are for trying the benchmark out**"
            if results["quick"]
            else ""
        )
        + ". Median and, in brackets, lowest and highest of the repetitions. A ratio is formed within "
        "each repetition, in which the sides take turns; below 1 we are cheaper.",
        "",
        "**Where we lose**" if lost else "No line says that we lose.",
        "",
        *(f"- {s}" for s in lost),
        *([""] if lost else []),
    ]
    if peers:
        out += ["**Beside peers**", "", markdown(peers), ""]
    if own:
        out += ["**Beside the plain work in the same process**", "", markdown(own), ""]
    if figures:
        out += ["**How cost grows**", ""]
        for name, title in ((s["name"], s["title"]) for s in results["growth"]):
            if name in figures:
                out += [f"![{title}](_static/{name}.svg)", ""]
    out += [
        "Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(packages.items())) + ".",
        "",
        END,
    ]
    return "\n".join(out)


def put(page: Path, text: str, heading: str = "## Time, beside peers") -> None:
    """Replace what an earlier run put into the page, or add it under its heading."""
    found = page.read_text() if page.is_file() else "# What it costs\n"
    if START in found and END in found:
        before, rest = found.split(START, 1)
        found = before + text + rest.split(END, 1)[1]
    elif heading in found:
        before, rest = found.split(heading, 1)
        found = f"{before}{heading}\n\n{text}\n\n{rest.lstrip()}"
    else:
        found = f"{found.rstrip()}\n\n{heading}\n\n{text}\n"
    page.write_text(found.rstrip() + "\n")
