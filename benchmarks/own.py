"""Our own figures, with their limits: the scripts beside this file, each in a process of its own.

They compare Guywire with the plain work in the same process; here their JSON becomes lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.comparisons import Plan
from benchmarks.driver import Row, limited, verdict

__all__ = ["SCRIPTS", "run"]

HERE = Path(__file__).resolve().parent
Line = tuple[str, str, str, float, float | None, str]
"""Figure, unit, what it is beside, value, limit, note."""


def _one(value: float, found: Mapping[str, float] | None = None) -> dict[str, Any]:
    low, high = (found["low"], found["high"]) if found else (value, value)
    return {"median": value, "low": low, "high": high, "each": [value]}


def _penalty(found: Mapping[str, Any]) -> list[Line]:
    size = f"{found['parameters'] / 1e6:.0f}M transformer"
    limits = {"guywire EWC, 1 task": found["limit"], "guywire EWC, 3 tasks": found["limit"]}
    lines: list[Line] = [
        (f"pull of {name.removeprefix('guywire ')}, {size}", "copies", "one copy of the parameters",
         value, limits.get(name), "" if name.startswith("guywire") else "for comparison; not ours")
        for name, value in found["ratios"].items() if not name.startswith("copy")
    ]  # fmt: skip
    grows = found["growth_1_to_3_tasks"]
    return [*lines, ("pull of EWC, 3 tasks over 1", "ratio", "after one task", grows, 1.15, "")]


def _data(found: Mapping[str, Any]) -> list[Line]:
    return [
        (
            f"data, {r['data']}, {r['model']}",
            "share",
            "a whole step",
            r["share"],
            found["limit"],
            "",
        )
        for r in found["rows"]
    ]


def _fisher(found: Mapping[str, Any]) -> list[Line]:
    lines: list[Line] = []
    for r in found["results"]:
        what = f"Fisher, {r['case']}, {r['parameters'] / 1e6:.1f}M"
        lines.append((what, "passes", "a plain pass", r["ratio"]["guywire"], r["target"], ""))
        if "memory_ratio" in r:
            ratio = r["memory_ratio"]
            lines.append((f"{what}, peak memory", "passes", "a plain pass", ratio, 1.2, ""))
    return lines


def _merge(found: Mapping[str, Any]) -> list[Line]:
    lines: list[Line] = []
    for r in found["rows"]:
        what = f"merge, 271M bf16, {r['method']} at {r['rate']:g}"
        against = "reading and writing the bytes"
        lines.append((what, "times", against, r["ratio"], found["time_limit"], ""))
        largest = found["private_mb_limit"]
        lines.append((f"{what}, private memory", "MB", "the limit", r["private_mb"], largest, ""))
    lines.append(
        ("merge, the command with its start", "times", "reading and writing the bytes",
         found["command_ratio"], None, "Python and torch start, too")
    )  # fmt: skip
    return lines


def _half(found: Mapping[str, Any]) -> list[Line]:
    return _numbers(found, "half fine-tuning", "full fine-tuning")


def _pego(found: Mapping[str, Any]) -> list[Line]:
    return [
        ("PEGO's pull, factored", "ratio", "the dense pull", 1 / found["dense_over_factored"],
         1 / found["limit"], ""),
        ("a layer with a group of 4 LoRAs", "ratio", "one LoRA of equal size",
         found["group_over_one_lora"], None, ""),
    ]  # fmt: skip


def _pela(found: Mapping[str, Any]) -> list[Line]:
    lines: list[Line] = [
        (f"PELA, forward at {name}", "ratio", "the original", value,
         found["limit_time"] if name == "c=3" else None, "")
        for name, value in found["forward_ratio"].items() if name != "original"
    ]  # fmt: skip
    steps = found["step_ratio"]
    return lines + [
        (f"PELA, a repair step with {name}", "ratio", "a plain step", value, None, "")
        for name, value in steps.items() if name != "plain"
    ]  # fmt: skip


def _numbers(found: Mapping[str, Any], what: str, beside: str) -> list[Line]:
    limit = found.get("limit_time", found.get("limit"))
    return [
        (f"{what}, {name.removesuffix('_ratio').replace('_', ' ')}", "ratio", beside, float(value),
         limit if name.startswith(("time", "step")) else None, "")
        for name, value in found.items()
        if name.endswith("ratio") and isinstance(value, int | float)
    ]  # fmt: skip


SCRIPTS: dict[
    str, tuple[Callable[[Mapping[str, Any]], list[Line]], list[str], list[str] | None]
] = {
    "penalty": (_penalty, [], ["--rounds", "9"]),
    "data": (_data, [], ["--steps", "30"]),
    "passes": (_fisher, ["--no-peers"], None),
    "half_fine_tuning": (_half, [], None),
    "pego": (_pego, [], ["--rounds", "3"]),
    "pela": (_pela, [], None),
    "files": (_merge, ["--no-mergekit"], None),
}
"""By name: how its JSON is read, its words, and its words with --quick (``None``: left out)."""
FILES = {"passes": "fisher", "files": "merge"}


def run(name: str, plan: Plan) -> list[Row]:
    """Run a script and return its lines; if it fails, one line that says so."""
    read, full, quick = SCRIPTS[name]
    words = quick if plan.quick else full
    if words is None:
        return []
    script = HERE / f"{FILES.get(name, name)}.py"
    done = subprocess.run(
        [sys.executable, str(script), "--json", *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=limited(plan.threads),
    )  # fmt: skip
    try:
        found = json.loads(done.stdout)
        lines = read(found)
    except (ValueError, KeyError, TypeError) as error:
        why = f"{script.name} ended with code {done.returncode}, {type(error).__name__}"
        return [Row(name, script.stem, "", "", None, None, None, None, f"not measured: {why}")]
    plan.answers[name] = found
    return [
        Row(name, figure, unit, beside, _one(value), None, None, limit,
            verdict(None, {"median": value}, limit) if limit is not None else "no limit set", note)
        for figure, unit, beside, value, limit, note in lines
    ]  # fmt: skip
