"""What a study's ``run`` works with: run units, and choose strengths on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from guywire.core.errors import UsageError
from guywire.lab.studies.statistics import Row, mean_of
from guywire.lab.studies.study import Unit

__all__ = ["Bench", "Choice", "Function"]

Function = Callable[..., list[dict[str, Any]]]


@dataclass
class Choice:
    """A strength chosen from a grid on validation data.

    Attributes:
        name: of the condition it was chosen for.
        metric: by which.
        better: ``"lower"`` or ``"higher"``.
        scores: strength to score (the mean over ``seeds``); what diverged is infinitely bad.
        best: the strength chosen.
        widened: how often the grid was widened, because its best value lay on its edge.
        on_edge: still on the edge when no further widening was allowed.
        plateau: the edge is no better than its neighbour by more than the tolerance, so going on
            would change nothing.
        seeds: on which.
    """

    name: str
    metric: str
    better: Literal["lower", "higher"]
    scores: dict[float, float] = field(default_factory=dict)
    best: float = math.nan
    widened: int = 0
    on_edge: bool = False
    plateau: bool = False
    seeds: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it for the result file.

        Returns:
            Plain values; the grid in increasing order.
        """
        grid = sorted(self.scores)
        return {
            "name": self.name,
            "metric": self.metric,
            "better": self.better,
            "grid": grid,
            "scores": [s if math.isfinite(s := self.scores[g]) else None for g in grid],
            "best": self.best,
            "widened": self.widened,
            "on_edge": self.on_edge,
            "plateau": self.plateau,
            "seeds": list(self.seeds),
        }


class Bench:
    """Runs the units of one study; made by the runner.

    Attributes:
        settings: as resolved.
        seeds: of this run.
        smoke: whether this is smoke size.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        seeds: Sequence[int],
        execute: Callable[[Sequence[Unit]], list[dict[str, Any]]],
        *,
        smoke: bool = False,
    ) -> None:
        self.settings = settings
        self.seeds = tuple(seeds)
        self.smoke = smoke
        self.rows: list[Row] = []
        self.choices: dict[str, Choice] = {}
        self._execute = execute

    def units(
        self,
        function: Function,
        conditions: Mapping[str, Mapping[str, Any]] | Sequence[str],
        *,
        seeds: Iterable[int] | None = None,
        cost: float = 1.0,
    ) -> list[Unit]:
        """Return one unit per condition and seed, for :meth:`run`.

        Args:
            function: a top-level function of the study's file, ``function(work, **arguments)``.
            conditions: names, or names to keyword arguments.
            seeds: all of the run's by default.
            cost: relative to other units; costly ones are started first.

        Returns:
            The units, seed by seed.
        """
        table = conditions if isinstance(conditions, Mapping) else {name: {} for name in conditions}
        return [
            Unit(function.__name__, name, seed, dict(arguments), cost)
            for seed in (self.seeds if seeds is None else seeds)
            for name, arguments in table.items()
        ]

    def run(self, units: Sequence[Unit], *, record: bool = True) -> list[Row]:
        """Run units side by side and wait for all of them.

        Args:
            units: they must not depend on each other.
            record: whether their rows belong to the study's results.

        Returns:
            The rows, in the order of the units.
        """
        rows = [row for result in self._execute(units) for row in result["rows"]]
        if record:
            self.rows.extend(rows)
        return rows

    def choose(
        self,
        function: Function,
        conditions: Mapping[str, Mapping[str, Any]],
        grid: Sequence[float],
        *,
        metric: str,
        better: Literal["lower", "higher"] = "lower",
        argument: str = "strength",
        seeds: Iterable[int] | None = None,
        widen: int = 3,
        tolerance: float = 0.0,
        cost: float = 1.0,
    ) -> dict[str, Choice]:
        """Choose a strength for each condition by a metric on validation data.

        A grid whose best value lies on its edge is widened on that side by a decade at a time, up
        to ``widen`` times, unless the scores have become flat there. Grids, scores and choices go
        into the result file; the rows do not (their test metrics are nobody's business here).

        Args:
            function: the unit function.
            conditions: names to keyword arguments.
            grid: strengths to begin with, at least two, all positive.
            metric: of validation data, never of test data.
            better: which way.
            argument: the keyword that takes the strength.
            seeds: to choose on; all of the run's by default.
            widen: how many further decades at most, on each side.
            tolerance: scores that differ by no more count as flat.
            cost: of one unit.

        Returns:
            The choice of each condition.

        Raises:
            UsageError: the grid is too short, or every value of it diverged.
        """
        start = sorted({float(value) for value in grid})
        if len(start) < 2 or start[0] <= 0.0:
            raise UsageError(f"the grid {list(grid)} needs at least two positive strengths")
        chosen_on = tuple(self.seeds if seeds is None else seeds)
        choices = {name: Choice(name, metric, better, seeds=chosen_on) for name in conditions}
        wanted = {name: list(start) for name in conditions}
        while any(wanted.values()):
            units = [
                Unit(function.__name__, name, seed, {**conditions[name], argument: value}, cost)
                for name, values in wanted.items()
                for value in values
                for seed in chosen_on
            ]
            results = iter(self._execute(units))
            for name, values in wanted.items():
                for value in values:
                    batch = [next(results) for _ in chosen_on]
                    choices[name].scores[value] = _score(batch, metric, better)
            wanted = {name: _next(choice, widen, tolerance) for name, choice in choices.items()}
        self.choices.update(choices)
        return choices


def _score(results: Sequence[Mapping[str, Any]], metric: str, better: str) -> float:
    values = [
        math.nan if row["value"] is None else float(row["value"])
        for result in results
        for row in result["rows"]
        if row["metric"] == metric and row.get("step") is None
    ]
    if len(values) != len(results):
        raise UsageError(f"the units yield {len(values)} rows of {metric!r}, not one each")
    mean = mean_of(values)
    return mean if math.isfinite(mean) else (math.inf if better == "lower" else -math.inf)


def _next(choice: Choice, widen: int, tolerance: float) -> list[float]:
    """Settle a choice, or return the strengths that must be tried first."""
    sign = 1.0 if choice.better == "lower" else -1.0
    grid = sorted(choice.scores)
    best = min(grid, key=lambda value: sign * choice.scores[value])
    choice.best = best
    if not math.isfinite(choice.scores[best]):
        raise UsageError(
            f"every strength of {choice.name!r} diverged, from {grid[0]:g} to {grid[-1]:g}"
        )
    choice.on_edge = best in (grid[0], grid[-1])
    choice.plateau = False
    if not choice.on_edge:
        return []
    neighbour = grid[1] if best == grid[0] else grid[-2]
    if abs(choice.scores[neighbour] - choice.scores[best]) <= tolerance:
        choice.plateau = True
        return []
    if choice.widened >= widen:
        return []
    choice.widened += 1
    # Rounded, so that 0.1 and 10 * 0.01 are one strength and one unit of the cache.
    return [float(f"{best / 10.0 if best == grid[0] else best * 10.0:.6g}")]
