"""Our own figures, with their limits: the scripts beside this file, each in a process of its own.

They compare Guywire with the plain work in the same process; here their JSON becomes lines.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparisons import Plan
from benchmarks.driver import Row, limited, spread, verdict

__all__ = ["SCRIPTS", "run"]

HERE = Path(__file__).resolve().parent
Line = tuple[str, str, str, float, Sequence[float], float | None, str]
"""Figure, unit, what it is beside, the value that a limit is for, every repetition's, limit, note.

The value is the median, but for a merge's private memory the highest. What is counted rather than
timed has one repetition.
"""


def _penalty(found: Mapping[str, Any]) -> list[Line]:
    size = f"{found['parameters'] / 1e6:.0f}M transformer"
    limits = {"guywire EWC, 1 task": found["limit"], "guywire EWC, 3 tasks": found["limit"]}
    lines: list[Line] = [
        (f"pull of {name.removeprefix('guywire ')}, {size}", "copies", "one copy of the parameters",
         value, found["each"][name], limits.get(name),
         "" if name.startswith("guywire") else "for comparison; not ours")
        for name, value in found["ratios"].items() if not name.startswith("copy")
    ]  # fmt: skip
    return [
        *lines,
        ("pull of EWC, 3 tasks over 1", "ratio", "after one task", found["growth_1_to_3_tasks"],
         found["growths_1_to_3_tasks"], 1.15, ""),
    ]  # fmt: skip


def _data(found: Mapping[str, Any]) -> list[Line]:
    return [
        (
            f"data, {r['data']}, {r['model']}",
            "share",
            "a whole step",
            r["share"],
            r["shares"],
            found["limit"],
            "",
        )
        for r in found["rows"]
    ]


def _fisher(found: Mapping[str, Any]) -> list[Line]:
    lines: list[Line] = []
    for r in found["results"]:
        what = f"Fisher, {r['case']}, {r['parameters'] / 1e6:.1f}M"
        ratio, each = r["ratio"]["guywire"], r["ratios"]["guywire"]
        lines.append((what, "passes", "a plain pass", ratio, each, r["target"], ""))
        if "memory_ratio" in r:
            what, ratio, each = f"{what}, peak memory", r["memory_ratio"], r["memory_ratios"]
            lines.append((what, "passes", "a plain pass", ratio, each, 1.2, ""))
    return lines


def _merge(found: Mapping[str, Any]) -> list[Line]:
    against = "reading and writing the bytes"
    over = "each repetition over the median of reading and writing"
    lines: list[Line] = []
    for r in found["rows"]:
        what = f"merge, 271M bf16, {r['method']} at {r['rate']:g}"
        lines += [
            (what, "times", against, r["ratio"], r["ratios"], found["time_limit"], over),
            (f"{what}, private memory", "MB", "the limit", r["private_mb"], r["private_mbs"],
             found["private_mb_limit"], "the limit is for the highest"),
        ]  # fmt: skip
    lines.append(
        ("merge, the command with its start", "times", against, found["command_ratio"],
         found["command_ratios"], None, f"Python and torch start, too; {over}")
    )  # fmt: skip
    return lines


def _half(found: Mapping[str, Any]) -> list[Line]:
    return _numbers(found, "half fine-tuning", "full fine-tuning")


def _pego(found: Mapping[str, Any]) -> list[Line]:
    return [
        ("PEGO's pull, factored", "ratio", "the dense pull", 1 / found["dense_over_factored"],
         [1 / x for x in found["each"]["dense_over_factored"]], 1 / found["limit"], ""),
        ("a layer with a group of 4 LoRAs", "ratio", "one LoRA of equal size",
         found["group_over_one_lora"], found["each"]["group_over_one_lora"], None, ""),
    ]  # fmt: skip


def _pela(found: Mapping[str, Any]) -> list[Line]:
    lines: list[Line] = [
        (f"PELA, forward at {name}", "ratio", "the original", value,
         found["forward_ratios"][name], found["limit_time"] if name == "c=3" else None, "")
        for name, value in found["forward_ratio"].items() if name != "original"
    ]  # fmt: skip
    return lines + [
        (f"PELA, a repair step with {name}", "ratio", "a plain step", value,
         found["step_ratios"][name], None, "")
        for name, value in found["step_ratio"].items() if name != "plain"
    ]  # fmt: skip


def _numbers(found: Mapping[str, Any], what: str, beside: str) -> list[Line]:
    limit = found.get("limit_time", found.get("limit"))
    return [
        (f"{what}, {name.removesuffix('_ratio').replace('_', ' ')}", "ratio", beside, float(value),
         found.get(f"{name}s", [value]), limit if name.startswith(("time", "step")) else None, "")
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
        rows = [
            Row(name, figure, unit, beside, spread(each), None, None, limit,
                verdict(None, {"median": value}, limit) if limit is not None else "no limit set",
                note)
            for figure, unit, beside, value, each, limit, note in read(found)
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        why = f"{script.name} ended with code {done.returncode}, {type(error).__name__}"
        return [Row(name, script.stem, "", "", None, None, None, None, f"not measured: {why}")]
    plan.answers[name] = found
    return rows
