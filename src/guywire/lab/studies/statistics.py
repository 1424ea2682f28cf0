"""Means, bootstrap intervals and paired differences over seeds, from tidy rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guywire.core.errors import UsageError

__all__ = ["Interval", "Row", "Table", "bootstrap"]

Row = Mapping[str, Any]
"""``condition, seed, metric, value`` and, where they help, more keys such as ``step``."""

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% bootstrap interval.

    Attributes:
        mean: over the seeds.
        low: lower end, ``None`` with fewer than two seeds.
        high: upper end, likewise.
        values: the value of each seed.
    """

    mean: float
    low: float | None
    high: float | None
    values: Mapping[int, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers for a result file.

        Returns:
            ``mean, low, high, n, values``; what is not finite is ``None``.
        """
        return {
            "mean": _finite(self.mean),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "n": self.n,
            "values": {str(seed): _finite(value) for seed, value in sorted(self.values.items())},
        }

    def words(self, digits: int = 3) -> str:
        """Return the interval as people write it.

        Args:
            digits: after the point.

        Returns:
            For instance ``0.031 [0.020, 0.040]``.
        """
        if self.low is None or self.high is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def bootstrap(values: Mapping[int, float], *, level: float = 0.95) -> Interval:
    """Return the mean of the seeds' values and its percentile bootstrap interval.

    With few seeds such an interval is too narrow (it cannot leave the range of the values), which
    is why rules of studies also ask for the sign in every seed. The generator is fixed: the same
    numbers give the same interval.

    Args:
        values: seed to value.
        level: of the interval.

    Returns:
        The interval.

    Raises:
        UsageError: there are no values.

    Example:
        >>> bootstrap({0: 1.0, 1: 1.0, 2: 1.0}).words(1)
        '1.0 [1.0, 1.0]'
    """
    if not values:
        raise UsageError("no values to take a mean of: the condition or the metric has no rows")
    array = np.array([values[seed] for seed in sorted(values)], dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2 or not np.isfinite(array).all():
        return Interval(mean, None, None, dict(values))
    draws = np.random.default_rng(0).integers(len(array), size=(_RESAMPLES, len(array)))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(array[draws].mean(axis=1), [tail, 1.0 - tail])
    return Interval(mean, float(low), float(high), dict(values))


class Table:
    """Tidy rows of a study, and the questions that its rules ask of them.

    Every difference asked for is remembered in ``differences``, so that the result file shows what
    the verdicts were computed from.

    Args:
        rows: ``condition, seed, metric, value``; rows with a ``step`` belong to curves.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [dict(row) for row in rows]
        self.differences: dict[tuple[str, str, str], Interval] = {}
        self._values: dict[tuple[str, str], dict[int, float]] = {}
        for row in self.rows:
            if row.get("step") is not None:
                continue
            cell = self._values.setdefault((row["condition"], row["metric"]), {})
            if row["seed"] in cell:
                raise UsageError(
                    f"two rows for condition {row['condition']!r}, seed {row['seed']}, metric "
                    f"{row['metric']!r}: give curves a 'step'"
                )
            cell[row["seed"]] = float(row["value"])

    def conditions(self) -> list[str]:
        """Return the conditions in order of appearance.

        Returns:
            Their names.
        """
        return list(dict.fromkeys(row["condition"] for row in self.rows))

    def values(self, condition: str, metric: str) -> dict[int, float]:
        """Return a metric of a condition, seed by seed.

        Args:
            condition: its name.
            metric: its name.

        Returns:
            Seed to value.

        Raises:
            UsageError: there is no such row.
        """
        found = self._values.get((condition, metric))
        if not found:
            raise UsageError(f"no rows with condition {condition!r} and metric {metric!r}")
        return dict(found)

    def mean(self, condition: str, metric: str) -> Interval:
        """Return the mean of a metric with its interval.

        Args:
            condition: its name.
            metric: its name.

        Returns:
            The interval over the seeds.
        """
        return bootstrap(self.values(condition, metric))

    def difference(self, first: str, second: str, metric: str) -> Interval:
        """Return ``first - second``, paired over the seeds that both have.

        Args:
            first: a condition.
            second: another.
            metric: of both.

        Returns:
            The interval of the differences.

        Raises:
            UsageError: they share no seed.
        """
        a, b = self.values(first, metric), self.values(second, metric)
        shared = sorted(a.keys() & b.keys())
        if not shared:
            raise UsageError(f"{first!r} and {second!r} share no seed for {metric!r}")
        result = bootstrap({seed: a[seed] - b[seed] for seed in shared})
        self.differences[first, second, metric] = result
        return result

    def statistics(self) -> list[dict[str, Any]]:
        """Return mean and interval of every condition and metric.

        Returns:
            One entry a pair, for the result file.
        """
        return [
            {"condition": condition, "metric": metric, **bootstrap(values).to_json()}
            for (condition, metric), values in self._values.items()
        ]

    def curves(self) -> list[dict[str, Any]]:
        """Return, for rows with a step, the mean over seeds at each step.

        Returns:
            One entry per condition and metric: ``steps``, ``mean``, ``low``, ``high``.
        """
        cells: dict[tuple[str, str], dict[float, dict[int, float]]] = {}
        for row in self.rows:
            if row.get("step") is None:
                continue
            by_step = cells.setdefault((row["condition"], row["metric"]), {})
            by_step.setdefault(row["step"], {})[row["seed"]] = float(row["value"])
        curves = []
        for (condition, metric), by_step in cells.items():
            steps = sorted(by_step)
            intervals = [bootstrap(by_step[step]) for step in steps]
            curves.append(
                {
                    "condition": condition,
                    "metric": metric,
                    "steps": steps,
                    "mean": [_finite(i.mean) for i in intervals],
                    "low": [_finite(i.low) for i in intervals],
                    "high": [_finite(i.high) for i in intervals],
                }
            )
        return curves


def mean_of(values: Sequence[float]) -> float:
    """Return the mean, or NaN of nothing.

    Args:
        values: numbers.

    Returns:
        Their mean.
    """
    return math.fsum(values) / len(values) if values else math.nan


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
