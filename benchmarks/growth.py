"""How cost grows with parameters, tasks and batch: measured series for the figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.comparisons import Plan, ewc, processes
from benchmarks.driver import Cost, Row, alternate, spread

__all__ = ["batch", "parameters", "tasks"]

Series = dict[str, Any]
"""``title``, ``x``, ``y``, ``log`` (names of logarithmic axes), ``lines``: name to ``[[x, median,
low, high], ...]``, ``missing``: name to why."""


def _points(found: Mapping[float, list[float] | None]) -> list[list[float]]:
    points = []
    for x, values in sorted(found.items()):
        if values:
            s = spread(values)
            points.append([x, s["median"], s["low"], s["high"]])
    return points


def parameters(plan: Plan) -> tuple[list[Row], list[Series]]:
    """The pulls as copies of the parameters, the Fisher as plain passes, from 1e5 to 1e8."""
    widths = {1e5: 220, 1e6: 702, 1e7: 2230, 1e8: 7065}
    if plan.quick:
        widths = {k: v for k, v in widths.items() if k <= 1e6}
    lines: dict[str, dict[float, list[float] | None]] = {
        "pull of L2": {}, "pull of EWC": {}, "Fisher": {},
    }  # fmt: skip
    notes: dict[str, str] = {}
    for about, width in widths.items():
        # a copy of few parameters takes microseconds: many rounds a repetition
        given = {"width": width, "batch": 16, "rounds": max(1, int(2e7 / about))}
        with processes(plan, {"guywire": (None, "growth.py", given)}) as (sides, out):
            answers, dropped = alternate(sides, max(plan.repeats, 7))
            size = sides["guywire"].about["parameters"] if sides else about
        notes |= {f"{about:g}": why for why in (out | dropped).values()}
        plan.answers[f"growth {about:g}"] = answers
        for name, thing, base in (
            ("pull of L2", "l2", "copy"), ("pull of EWC", "ewc", "copy"),
            ("Fisher", "fisher", "plain"),
        ):  # fmt: skip
            lines[name][size] = Cost("guywire", thing, base).read(answers)
    pulls = {k: _points(v) for k, v in lines.items() if k != "Fisher"}
    return [], [
        {"title": "A penalty's pull", "name": "growth-parameters", "x": "parameters",
         "y": "times one copy of the parameters", "log": ["x"], "lines": pulls, "missing": notes},
        {"title": "The exact Fisher", "name": "growth-fisher", "x": "parameters",
         "y": "times a plain pass, batch 16", "log": ["x"],
         "lines": {"Fisher": _points(lines["Fisher"])}, "missing": notes},
    ]  # fmt: skip


def tasks(plan: Plan) -> tuple[list[Row], list[Series]]:
    """Step and memory of EWC against tasks, from what the comparison ``ewc`` measured."""
    rows = [] if "ewc" in plan.answers else ewc(plan)
    answers = plan.answers["ewc"]
    times: dict[str, list[list[float]]] = {}
    memory: dict[str, list[list[float]]] = {}
    for side, label in (("guywire", "Guywire"), ("avalanche", "Avalanche")):
        of = answers.get(side, {})
        after = sorted(int(t.removeprefix("ewc")) for t in of if t.startswith("ewc"))
        times[label] = _points({k: Cost(side, f"ewc{k}", "plain").read(answers) for k in after})
        size = plan.about["ewc"].get(side, {}).get("parameters", 1) * 4
        memory[label] = _points(
            {k: [v / size for v in Cost(side, f"ewc{k}", key="held_bytes").read(answers) or []]
             for k in after}
        )  # fmt: skip
    missing = {k: "not measured" for k, v in times.items() if not v}
    return rows, [
        {"title": "A step with EWC", "name": "growth-tasks", "x": "tasks", "y": "times a plain step",
         "log": ["x", "y"], "lines": times, "missing": missing},
        {"title": "What EWC holds", "name": "growth-memory", "x": "tasks",
         "y": "times the parameters", "log": ["x", "y"], "lines": memory, "missing": missing},
    ]  # fmt: skip


def batch(plan: Plan) -> tuple[list[Row], list[Series]]:
    """The Fisher against batch size, over a plain pass at the same batch, beside peers."""
    sizes = [4, 16, 64] if plan.quick else [1, 4, 16, 64, 256]
    names = {"guywire": "Guywire", "nngeometry": "nngeometry", "backpack": "BackPACK"}
    lines: dict[str, dict[float, list[float] | None]] = {v: {} for v in names.values()}
    missing: dict[str, str] = {}
    for size in sizes:
        given = {
            "model": "mlp",
            "width": 200 if plan.quick else 1000,
            "batch": size,
            # enough work to time, without a minute of batches of one
            "samples": max(size, 32),
        }
        env = "fisher" if plan.peers else None
        with processes(plan, {"guywire": (env, "fisher.py", given)}) as (sides, out):
            answers, dropped = alternate(sides, plan.repeats)
            for side in sides.values():
                missing |= {names.get(k, k): v for k, v in side.about.get("notes", {}).items()}
        for key, why in (out | dropped).items():
            missing[names.get(key.split("/")[-1], key)] = why
        plan.answers[f"growth batch {size}"] = answers
        for thing, label in names.items():
            lines[label][size] = Cost("guywire", thing, "plain").read(answers)
    return [], [
        {"title": "The exact Fisher of an MLP", "name": "growth-batch", "x": "batch",
         "y": "times a plain pass at that batch", "log": ["x", "y"],
         "lines": {k: _points(v) for k, v in lines.items()}, "missing": missing},
    ]  # fmt: skip


def summary(series: list[Series]) -> list[str]:
    """A sentence for each line of each figure."""
    said = []
    for s in series:
        for name, points in s["lines"].items():
            if not points:
                continue
            first, last = points[0], points[-1]
            middle = statistics.median(p[1] for p in points)
            said.append(
                f"{s['title']}, {name}: {first[1]:.3g} at {first[0]:g} {s['x']}, {last[1]:.3g} at "
                f"{last[0]:g} (median {middle:.3g} {s['y']})"
            )
    return said
