"""Read a run directory: the only door through which numbers reach the report.

A run may be unfinished, or some of its trials may have failed; what is there is read, what is
missing is named. The files and their columns are described in the design page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from guywire.core.errors import DataError, need
from guywire.lab.training.tables import parse_toml

__all__ = ["Curve", "Run", "TaskFacts", "Trial", "read_run"]

_REMEDY = "guywire compare --resume --out with the run's folder mends it, or says what to do"


@dataclass(frozen=True, slots=True)
class Curve:
    """One per-iteration curve.

    Attributes:
        step: ``[N]`` training steps over the whole stream, ascending.
        task: ``[N]`` the task that was being trained.
        value: ``[N]`` the value at that step.
    """

    step: np.ndarray
    task: np.ndarray
    value: np.ndarray


@dataclass(frozen=True, slots=True)
class Trial:
    """One method with one seed.

    Attributes:
        name: the directory's name.
        method: the method's slug.
        seed: the seed, None when it cannot be told.
        status: ``done``, ``failed``, ``unfinished`` or ``missing``.
        note: why it is not done, in words; empty when it is.
        result: the content of ``result.json``, empty when there is none.
        curves: evaluated task to accuracy curve.
    """

    name: str
    method: str
    seed: int | None
    status: str
    note: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[int, Curve] = field(default_factory=dict)

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Flat name to number, as in ``result.json``."""
        return self.result.get("metrics") or {}

    def metric(self, name: str) -> float | None:
        """One summary number; None when it is absent or not a finite number."""
        value = self.metrics.get(name, self.result.get(name))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if math.isfinite(value) else None

    @property
    def matrix(self) -> list[list[float | None]]:
        """Accuracy by trained-through task (row) and evaluated task (column)."""
        rows = self.result.get("accuracy_matrix") or []
        try:
            return [[None if v is None or math.isnan(v) else float(v) for v in row] for row in rows]
        except (TypeError, OverflowError) as error:
            raise DataError(f"the accuracy_matrix of {self.name!r} is none: {_REMEDY}") from error


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What the report shows of a task.

    Attributes:
        name: the task's name.
        classes: names of its classes.
        sizes: ``train``, ``valid``, ``test`` to number of samples.
        picture: PNG bytes of a montage; None for text streams.
        texts: sample texts with their class, ``(text, class name or "")``.
    """

    name: str
    classes: tuple[str, ...]
    sizes: Mapping[str, int]
    picture: bytes | None
    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """All that a report is made from.

    Attributes:
        name: the directory's name.
        config_text: ``config.toml`` as it stands, empty when missing.
        config: the same, parsed.
        info: ``run.json``.
        stream: ``stream.json`` without its tasks.
        tasks: the tasks in order.
        trials: every trial that ran or should have, ordered by method and seed.
        sweep: ``sweep.json``, empty when nothing was tuned.
    """

    name: str
    config_text: str
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    stream: Mapping[str, Any]
    tasks: tuple[TaskFacts, ...]
    trials: tuple[Trial, ...]
    sweep: Mapping[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """Slugs of the methods, in the order of the configuration."""
        return tuple(dict.fromkeys(t.method for t in self.trials))

    def of(self, method: str, status: str = "done") -> tuple[Trial, ...]:
        """The trials of one method with a given status."""
        return tuple(t for t in self.trials if t.method == method and t.status == status)


def read_run(run_dir: Path) -> Run:
    """Read a run directory.

    Args:
        run_dir: a directory that ``guywire compare`` wrote, finished or not.

    Returns:
        What it holds.

    Raises:
        DataError: there is no run here, or a file that should be JSON, TOML, or Parquet is not.
    """
    if not (run_dir / "run.json").is_file() and not (run_dir / "config.toml").is_file():
        raise DataError(
            f"{str(run_dir)!r} holds no run (neither run.json nor config.toml): "
            "give the directory that `guywire compare` wrote"
        )
    path = run_dir / "config.toml"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        config = parse_toml(text)
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not TOML ({error}): {_REMEDY}") from error
    info = _json(run_dir / "run.json")
    stream = dict(_json(run_dir / "stream.json"))
    try:
        names = stream.get("class_names") or []
        tasks = _tasks(stream.pop("tasks", []), names, run_dir / "samples")
        trials = _trials(run_dir / "trials", config, info)
    except DataError:
        raise
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
        raise DataError(
            f"the files of {str(run_dir)!r} hold what no run writes ({str(error)[:200]}): {_REMEDY}"
        ) from error
    tuned = _json(run_dir / "sweep.json")
    return Run(run_dir.resolve().name, text, config, info, stream, tasks, trials, tuned)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(found, dict):
        raise DataError(f"{str(path)!r} holds no JSON object: {_REMEDY}")
    return found


def _remark(path: Path) -> dict[str, Any]:
    """Read a file that only informs; a damaged one informs no more."""
    try:
        return _json(path)
    except DataError:
        return {}


def _tasks(
    listed: list[dict[str, Any]], class_names: list[str], samples: Path
) -> tuple[TaskFacts, ...]:
    tasks = []
    for i, entry in enumerate(listed):
        png = samples / f"task-{i}.png"
        sizes = entry.get("sizes") or {k: entry.get(k) for k in ("train", "valid", "test")}
        tasks.append(
            TaskFacts(
                name=str(entry.get("name") or f"task {i + 1}"),
                classes=tuple(_class_name(c, class_names) for c in entry.get("classes") or ()),
                sizes={str(k): int(v) for k, v in sizes.items() if v is not None},
                picture=png.read_bytes() if png.is_file() else None,
                texts=tuple(
                    _text(t, class_names) for t in entry.get("texts") or entry.get("samples") or ()
                ),
            )
        )
    return tuple(tasks)


def _class_name(label: Any, names: list[str]) -> str:
    if isinstance(label, int) and 0 <= label < len(names):
        return str(names[label])
    return str(label)


def _text(sample: Any, names: list[str]) -> tuple[str, str]:
    if isinstance(sample, str):
        return sample, ""
    if isinstance(sample, dict):
        label = sample.get("label", sample.get("class"))
        return str(sample.get("text", "")), "" if label is None else _class_name(label, names)
    text, label = sample
    return str(text), _class_name(label, names)


def _trials(folder: Path, config: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[Trial, ...]:
    found = {}
    for directory in sorted(folder.iterdir()) if folder.is_dir() else ():
        if directory.is_dir():
            found[directory.name] = _trial(directory, info)
    methods = [str(m) for m in config.get("methods") or ()]
    seeds = config.get("seeds", ())
    if isinstance(seeds, int) and seeds > 100_000:
        raise ValueError(f"{seeds} seeds")
    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    have = {(t.method, t.seed) for t in found.values()}
    for method in methods:
        for seed in seeds:
            if (method, seed) not in have:
                name = f"{method}-seed{seed}"
                found[name] = Trial(name, method, seed, "missing", "it has not started")
    rank = {m: i for i, m in enumerate(methods)}
    return tuple(
        sorted(
            found.values(),
            key=lambda t: (rank.get(t.method, len(rank)), t.method, t.seed or 0, t.name),
        )
    )


def _trial(directory: Path, info: Mapping[str, Any]) -> Trial:
    name = directory.name
    result = _json(directory / "result.json")
    progress = _remark(directory / "progress.json")
    method, _, tail = name.rpartition("-seed")
    seed = int(tail) if tail.isdigit() else None
    method = str(result.get("method") or method or name)
    seed = result.get("seed", seed)
    curves = _curves(directory / "metrics.parquet")
    error = _failure(name, result, progress, directory, info)
    if error:
        return Trial(name, method, seed, "failed", error, {}, curves)
    if not result:
        at, total = progress.get("step"), progress.get("total")
        note = f"it stopped at step {at} of {total}" if at is not None else "it left no result"
        return Trial(name, method, seed, "unfinished", note, {}, curves)
    return Trial(name, method, seed, "done", "", result, curves)


def _failure(
    name: str,
    result: Mapping[str, Any],
    progress: Mapping[str, Any],
    directory: Path,
    info: Mapping[str, Any],
) -> str:
    """The error of a failed trial, empty when it did not fail."""
    for source in (result, progress, _remark(directory / "error.json")):
        if source.get("error"):
            return str(source["error"])
    failed = info.get("failed") or info.get("failures") or {}
    if isinstance(failed, dict) and name in failed:
        return str(failed[name])
    if not result and (directory / "error.json").is_file():
        return "it failed, and its error.json is damaged"
    return ""


def _curves(path: Path) -> dict[int, Curve]:
    if not path.is_file():
        return {}
    pyarrow = need("pyarrow", extra="cli")
    parquet = need("pyarrow.parquet", extra="cli")
    columns = ["step", "task", "evaluated", "metric", "value"]
    try:
        table = parquet.read_table(path, columns=columns, filters=[("metric", "==", "accuracy")])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r} is damaged ({error}): {_REMEDY}") from error
    step, task, evaluated, value = (
        table[c].to_numpy(zero_copy_only=False) for c in ("step", "task", "evaluated", "value")
    )
    curves = {}
    for k in np.unique(evaluated[evaluated >= 0]):
        rows = np.flatnonzero((evaluated == k) & np.isfinite(value))
        rows = rows[np.argsort(step[rows], kind="stable")]
        if len(rows):
            curves[int(k)] = Curve(step[rows], task[rows], value[rows].astype(float))
    return curves
