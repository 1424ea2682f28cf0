"""The sweep before a comparison: plan it, run it on validation data, choose."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guywire.core import writing
from guywire.core.errors import GuywireError, NonFiniteError, UsageError, need
from guywire.lab.streams import Stream
from guywire.lab.training.config import CompareConfig, Training, TrialSpec
from guywire.lab.training.grid import Outcome
from guywire.lab.training.run import RunFolder
from guywire.lab.training.sweep import space, tpe
from guywire.lab.training.sweep.space import Axis, Values

__all__ = ["FILE", "FOLDER", "check", "corners", "count", "options_of", "tune"]

FILE, FOLDER = "sweep.json", "sweep"
_SHOWN = ("accuracy", "forgetting")

Runner = Callable[[Sequence[TrialSpec], Path], list[Outcome]]


def check(config: CompareConfig) -> None:
    """Refuse a sweep that makes no sense, before anything runs.

    Args:
        config: with a sweep.

    Raises:
        UsageError: the first thing that is wrong.
        MissingExtraError: the sampler needs a package that is not installed.
    """
    sweep = config.sweep
    assert sweep is not None
    for method in space.tuned_methods(config):
        space.axes_of(method, config)
    shared = set(sweep.seed_list(config.seed_list)) & set(config.seed_list)
    if shared:
        raise UsageError(
            f"sweep.seeds has {min(shared)}, which is a seed of the comparison: nothing may be tuned "
            "on what is reported; choose others"
        )
    if sweep.watched and not config.evaluation.enabled:
        raise UsageError(
            f"sweep.metric = {sweep.metric!r} needs evaluation at every step, which "
            "evaluation.enabled = false switches off: switch it on, or choose accuracy"
        )
    if sweep.storage != "sqlite" and sweep.sampler != "tpe":
        raise UsageError(
            f"sweep.storage is for the sampler 'tpe', and {sweep.sampler!r} has no study to keep: "
            "leave it out, or set sweep.sampler = 'tpe'"
        )
    if sweep.sampler == "tpe":
        need("optuna", extra="sweep")
        need("sqlalchemy", extra="sweep")
        if sweep.storage != "sqlite":
            need("psycopg", extra="postgres")


def check_data(stream: Stream) -> None:
    """Refuse data on which nothing can be tuned.

    Args:
        stream: the data.

    Raises:
        UsageError: a task has no validation data.
    """
    for index, task in enumerate(stream.tasks):
        if len(task.valid) == 0:
            raise UsageError(
                f"task {index} ({task.name!r}) has no validation data to tune on: set "
                "stream.valid_fraction above 0, or use fewer tasks"
            )


def corners(config: CompareConfig) -> list[TrialSpec]:
    """Return trials with every value of a grid, or with the ends of ranges, to see that they build.

    Args:
        config: with a sweep, resolved.

    Returns:
        One spec a method and combination.
    """
    assert config.sweep is not None
    points = config.sweep.points if config.sweep.sampler == "grid" else 2
    seed = config.sweep.seed_list(config.seed_list)[0]
    found = []
    for method in space.tuned_methods(config):
        for number, values in enumerate(space.grid(space.axes_of(method, config), points)):
            found.append(_spec(config, method, number, values, seed))
    return found


def count(config: CompareConfig) -> int:
    """Return how many trials the sweep takes.

    Args:
        config: with a sweep or without.

    Returns:
        Values times seeds, of all methods.
    """
    if config.sweep is None:
        return 0
    seeds = len(config.sweep.seed_list(config.seed_list))
    return seeds * sum(_Method(m, config).count for m in space.tuned_methods(config))


def options_of(config: CompareConfig, document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options that each tuned method runs with in the comparison.

    Args:
        config: the settings.
        document: what :func:`tune` returned.

    Returns:
        Method to options.
    """
    return {
        entry["method"]: space.options_with(entry["method"], config.options, entry["chosen"])
        for entry in document["methods"]
    }


def tune(config: CompareConfig, run: RunFolder, runner: Runner) -> dict[str, Any]:
    """Try values on validation data and choose the best of each method.

    Trials of all methods run side by side. Those of a grid and of random values are known
    beforehand; those of TPE come in batches of a fixed size. Nothing depends on who finishes first,
    and a sweep that was killed goes on as if it had not been.

    Args:
        config: with a sweep, resolved.
        run: the folder: trials go to ``sweep/``, the outcome to ``sweep.json``.
        runner: runs trials in a folder.

    Returns:
        The content of ``sweep.json``.

    Raises:
        NonFiniteError: a method diverged with every value.
        GuywireError: a trial failed for another reason, or a file or database cannot be used.
        KeyboardInterrupt: on Ctrl-C; the run can be resumed.
    """
    sweep = config.sweep
    assert sweep is not None
    methods = [_Method(m, config) for m in space.tuned_methods(config)]
    folder = run.path / FOLDER
    with contextlib.ExitStack() as stack:
        if sweep.sampler == "tpe":
            name = _run_id(run)
            for method in methods:
                ledger = tpe.Ledger(
                    f"{name}: {method.name}",
                    _mark(config, method),
                    method.axes,
                    sweep,
                    run.path,
                )
                stack.callback(ledger.close)
                method.ledger = ledger
        while any(method.left for method in methods):
            batch = [(method, number) for method in methods for number in method.ask()]
            seeds = sweep.seed_list(config.seed_list)
            specs = [
                _spec(config, m.name, number, m.tried[number].values, seed)
                for m, number in batch
                for seed in seeds
            ]
            outcomes = {o.spec.id: o for o in runner(specs, folder)}
            _refuse_failures(outcomes, folder)
            for method, number in batch:
                mine = [
                    outcomes[spec.id]
                    for spec in specs
                    if (spec.method, spec.sweep) == (method.name, number)
                ]
                method.tell(number, mine)
    document = {
        "sampler": sweep.sampler,
        "metric": sweep.metric,
        "minimised": sweep.minimised,
        "seeds": list(sweep.seed_list(config.seed_list)),
        "evaluated_on": "valid",
        "methods": [method.document() for method in methods],
        "not_tuned": [m for m in config.methods if m not in {method.name for method in methods}],
    }
    writing.write_json(run.path / FILE, document)
    return document


class _Method:
    """What is tried with one method, and what came of it."""

    def __init__(self, name: str, config: CompareConfig) -> None:
        assert config.sweep is not None
        self.name, self.config, self.sweep = name, config, config.sweep
        self.axes: list[Axis] = space.axes_of(name, config)
        self.known: list[Values] | None = None
        self.count = self.sweep.trials
        if self.sweep.sampler == "grid":
            self.known = space.grid(self.axes, self.sweep.points)
            self.count = len(self.known)
        elif self.sweep.sampler == "random":
            self.known = space.drawn(self.axes, self.sweep.trials, config.seed, name)
        self.tried: list[tpe.Tried] = []
        self.rows: list[dict[str, Any]] = []
        self.ledger: tpe.Ledger | None = None

    @property
    def left(self) -> int:
        return self.count - len(self.tried)

    def ask(self) -> Iterator[int]:
        """Add the next batch, and give its numbers."""
        first = len(self.tried)
        if self.known is not None:
            self.tried += [tpe.Tried(values) for values in self.known[first:]]
        else:
            for _ in range(min(self.sweep.batch, self.left)):
                values = tpe.suggest(self.axes, self.tried, self.sweep, self.config.seed, self.name)
                self.tried.append(tpe.Tried(values))
                if self.ledger is not None:
                    self.ledger.asked(len(self.tried) - 1, values)
        return iter(range(first, len(self.tried)))

    def tell(self, number: int, outcomes: Sequence[Outcome]) -> None:
        """Take what came of one of the values."""
        seeds = []
        for outcome in outcomes:
            row: dict[str, Any] = {"seed": outcome.spec.seed}
            if outcome.result is None:
                row["error"] = outcome.error
            else:
                metrics = outcome.result["metrics"]
                row |= {k: metrics.get(k) for k in dict.fromkeys((*_SHOWN, self.sweep.metric))}
            seeds.append(row)
        scores = [row.get(self.sweep.metric) for row in seeds]
        whole = all(score is not None and math.isfinite(score) for score in scores)
        score = math.fsum(scores) / len(scores) if whole else None
        one = self.tried[number]
        one.score, one.known = score, True
        self.rows.append({"number": number, "values": one.values, "score": score, "seeds": seeds})
        if self.ledger is not None:
            self.ledger.told(number, score)

    def document(self) -> dict[str, Any]:
        sign = -1.0 if self.sweep.minimised else 1.0
        good = [row for row in self.rows if row["score"] is not None]
        if not good:
            raise NonFiniteError(
                f"the sweep of {self.name!r} found no value with which its {self.sweep.metric} is "
                "known: try lower ones, or a lower --lr"
            )
        most = max(sign * row["score"] for row in good)
        best = _middle([row for row in good if sign * row["score"] == most])
        return {
            "method": self.name,
            "options": [axis.described() for axis in self.axes],
            "trials": self.rows,
            "best": best["number"],
            "chosen": best["values"],
            "score": best["score"],
            "edges": {
                axis.name: edge
                for axis in self.axes
                if (edge := _edge(axis.name, best["values"], self.rows))
            },
        }


def _middle(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of values that are equally good, take the middle of the plateau, or else the first."""
    if all(space.is_number(v) for row in rows for v in row["values"].values()):
        rows = sorted(rows, key=lambda row: (*row["values"].values(), row["number"]))
        return rows[(len(rows) - 1) // 2]
    return rows[0]


def _edge(name: str, best: Values, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Tell on which side of the best value nothing was tried."""
    tried = {row["values"][name] for row in rows if space.is_number(row["values"][name])}
    if not space.is_number(best[name]) or len(tried) < 2:
        return None
    if best[name] == min(tried):
        return "low"
    return "high" if best[name] == max(tried) else None


def _spec(config: CompareConfig, method: str, number: int, values: Values, seed: int) -> TrialSpec:
    assert config.sweep is not None
    looked = config.evaluation.model_copy(update={"enabled": config.sweep.watched})
    return config.trial(
        method,
        seed,
        space.options_with(method, config.options, values),
        sweep=number,
        evaluation=looked,
    )


def _refuse_failures(outcomes: Mapping[str, Outcome], folder: Path) -> None:
    """Divergence is an answer; any other failure leaves the question open."""
    failed = [o for o in outcomes.values() if o.result is None and not _diverged(folder, o)]
    if failed:
        raise GuywireError(
            f"{len(failed)} of {len(outcomes)} trials of the sweep failed, the first: "
            f"{failed[0].error}; correct that and go on with --resume"
        )


def _diverged(folder: Path, outcome: Outcome) -> bool:
    try:
        told = json.loads((folder / outcome.spec.id / "error.json").read_text(encoding="utf-8"))
        return told["kind"] == NonFiniteError.__name__
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _run_id(run: RunFolder) -> str:
    """What tells this run's studies from those of other runs in the same database."""
    known = run.facts().get("sweep_id")
    if known is None:
        known = f"{run.path.resolve().name}-{uuid.uuid4().hex[:12]}"
        run.note(sweep_id=known)
    return str(known)


def _mark(config: CompareConfig, method: _Method) -> str:
    sweep = method.sweep
    training = {
        name: getattr(config, name)
        for name in Training.model_fields
        if name not in ("checkpoint", "evaluation")
    }
    facts = {
        **training,
        "stream": config.stream.model_dump(mode="json"),
        "model": config.model,
        "options": config.options,
        "method": method.name,
        "axes": [axis.described() for axis in method.axes],
        "seeds": sweep.seed_list(config.seed_list),
        "run_seed": config.seed,
        "metric": sweep.metric,
        "trials": [sweep.trials, sweep.batch],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
