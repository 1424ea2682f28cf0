"""Run one study: its units, its numbers, its verdicts, and the result file that says it all."""

from __future__ import annotations

import difflib
import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import guywire
from guywire.core.errors import UsageError
from guywire.core.writing import write_json, write_parquet
from guywire.lab.studies import load, module_of
from guywire.lab.studies.bench import Bench, Choice
from guywire.lab.studies.cache import Cache, default_folder, fingerprint, sweep
from guywire.lab.studies.crew import Crew
from guywire.lab.studies.pool import Pool, Progress
from guywire.lab.studies.statistics import Row, Table
from guywire.lab.studies.study import Claim, Study

__all__ = ["FORMAT", "cores", "resolve", "run_study"]

FORMAT = 1
"""Version of the result file."""


def run_study(
    name: str,
    out: Path,
    *,
    smoke: bool = False,
    seeds: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    crew: Crew | None = None,
    fresh: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a study, or what is left of it, and write its result.

    Args:
        name: a slug, or the path of a study's file.
        out: folder of results; this one goes to ``<slug>/full``, ``smoke`` or ``custom``.
        smoke: small, quick and without verdicts.
        seeds: how many; the study's own number by default.
        overrides: settings to replace.
        workers: processes; one a core by default.
        crew: processes shared with other studies, in place of ``workers``.
        fresh: forget what was computed before.
        cache: of finished units; the user's cache folder by default.
        progress: told of every unit.

    Returns:
        The result, as in ``result.json``, and the folder under ``"folder"``.

    Raises:
        UsageError: the study or a setting is unknown.
        StudyError: a unit failed.
    """
    study = load(name)
    overrides = dict(overrides or {})
    settings = resolve(study, smoke=smoke, overrides=overrides)
    count = seeds if seeds is not None else (1 if smoke else study.seeds)
    if count < 1:
        raise UsageError(f"--seeds {count}: a study needs at least one seed")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least one process must do the work")
    store = Cache(
        cache or default_folder(), study.slug, fingerprint(study, module_of(name), settings)
    )
    store.open(fresh=fresh)
    with Pool(
        name,
        study.slug,
        settings,
        store,
        workers=workers or cores(),
        crew=crew,
        progress=progress,
    ) as pool:
        bench = Bench(settings, range(count), pool.execute, smoke=smoke)
        study.run(bench)
        records, computed = list(pool.records.values()), pool.computed
    result = _result(study, bench, records, settings)
    size = "smoke" if smoke else "custom" if overrides else "full"
    result |= {"size": size, "overrides": overrides, "computed_units": computed, "called": name}
    folder = out / study.slug / size
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    write_parquet(folder / "rows.parquet", _columns(bench.rows))
    write_json(folder / "result.json", result)
    return result | {"folder": str(folder)}


def resolve(study: Study, *, smoke: bool, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run.

    Args:
        study: the study.
        smoke: smoke size.
        overrides: settings to replace.

    Returns:
        The settings.

    Raises:
        UsageError: a setting is unknown or of another type.
    """
    settings = dict(study.settings) | (dict(study.smoke) if smoke else {})
    for key, value in overrides.items():
        if key not in settings:
            near = difflib.get_close_matches(key, settings, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(settings))}"
            raise UsageError(f"the study {study.slug!r} has no setting {key!r}: {hint}")
        settings[key] = _like(key, value, settings[key])
    if study.validate is not None:
        study.validate(settings)
    return settings


def _like(key: str, value: Any, present: Any) -> Any:
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if present is None or value is None or type(value) is type(present):
        return value
    raise UsageError(
        f"the setting {key!r} is {value!r}, but must be of the type of {present!r}, "
        f"{type(present).__name__}"
    )


def _result(
    study: Study, bench: Bench, records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    table = Table(
        {**row, "value": math.nan if row["value"] is None else row["value"]} for row in bench.rows
    )
    checks = [{"says": check.says, "holds": bool(check.holds(table))} for check in study.checks]
    sound = all(check["holds"] for check in checks)
    claims = [_judged(claim, table, bench, sound=sound) for claim in study.claims]
    return {
        "format": FORMAT,
        "slug": study.slug,
        "title": study.title,
        "paper": study.paper,
        "summary": study.summary,
        "settings": dict(settings),
        "seeds": list(bench.seeds),
        "claims": claims,
        "checks": checks,
        "statistics": table.statistics(),
        "differences": [
            {"first": first, "second": second, "metric": metric, **interval.to_json()}
            for (first, second, metric), interval in table.differences.items()
        ],
        "curves": table.curves(),
        "choices": [choice.to_json() for choice in bench.choices.values()],
        "plots": [vars(plot) | {"conditions": list(plot.conditions)} for plot in study.plots],
        "notes": list(study.notes),
        "cost": _cost(records),
        "versions": _versions(study),
        "machine": _machine(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _judged(claim: Claim, table: Table, bench: Bench, *, sound: bool) -> dict[str, Any]:
    if bench.smoke:
        verdict, allows = "smoke", "Smoke size: everything ran; nothing is claimed."
    elif not sound:
        verdict, allows = (
            "inconclusive",
            "A check of the study itself failed, so nothing is claimed.",
        )
    else:
        judgement = claim.judge(table)
        verdict, allows = judgement.verdict, judgement.allows
        stuck = [name for name in claim.rests_on if _stuck(bench.choices.get(name))]
        if stuck:
            verdict = "inconclusive"
            allows += f" The strength of {', '.join(stuck)} is still at the edge of its grid."
    return {
        "name": claim.name,
        "says": claim.says,
        "rule": claim.rule,
        "rests_on": list(claim.rests_on),
        "verdict": verdict,
        "allows": allows,
    }


def _stuck(choice: Choice | None) -> bool:
    return choice is not None and choice.on_edge and not choice.plateau


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = dict.fromkeys(["condition", "seed", "metric", "value"])
    for row in rows:
        names |= dict.fromkeys(row)
    return {name: [row.get(name) for row in rows] for name in names}


def _cost(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # The wall clock of a study that was interrupted, or answered from its cache, is the time during
    # which some unit of it was running.
    wall, end = 0.0, -math.inf
    for start, seconds in sorted((r["started"], r["seconds"]) for r in records):
        wall += max(0.0, start + seconds - max(start, end))
        end = max(end, start + seconds)
    return {
        "units": len(records),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(sum(r["cpu_seconds"] for r in records), 1),
        "peak_memory_mb": round(max((r["peak_memory_mb"] for r in records), default=0.0), 1),
    }


def _versions(study: Study) -> dict[str, str]:
    versions = {"guywire": guywire.__version__, "python": platform.python_version()}
    for package in ("torch", "numpy", *study.packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        versions["commit"] = found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # installed from a wheel, or no git here
    return versions


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
    }
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        machine["processor"] = names[0] if names else platform.processor()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        machine["memory_gb"] = round(pages * size / 2**30, 1)
    return machine


def cores() -> int:
    """Return how many cores this process may use.

    Returns:
        At least one.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
