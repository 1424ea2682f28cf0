"""Curves along the line between two sets of weights, and what they say: barrier, best point, gain.

Source: Frankle, Dziugaite, Roy, Carbin, arXiv 1912.05671 (the barrier).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from guywire.core.errors import UsageError

__all__ = ["ALL", "Connectivity", "with_mean"]

ALL = "all"
"""The mean over the sets, each counting the same."""

Metric = Literal["loss", "accuracy"]


@dataclass(frozen=True)
class Connectivity:
    """Curves along the straight line from one set of weights to another.

    Attributes:
        positions: from 0 (the start) to 1 (the end).
        loss: names of sets, and ``all``, to the mean loss at each position.
        accuracy: the same of accuracies; empty where only losses are known.
        distance: Euclidean distance of the two ends.
    """

    positions: tuple[float, ...]
    loss: Mapping[str, tuple[float, ...]]
    accuracy: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    distance: float = math.nan

    def barrier(self, name: str = ALL) -> float:
        """Return how far the loss rises above the straight line between its ends; at least 0.

        Args:
            name: of a set.

        Returns:
            The barrier; NaN if a loss is.

        Raises:
            UsageError: there is no such set.
        """
        curve = self._curve("loss", name)
        line = [(1.0 - s) * curve[0] + s * curve[-1] for s in self.positions]
        # At the ends the difference is zero, whatever rounding says.
        inside = [c - e for c, e in zip(curve[1:-1], line[1:-1], strict=True)]
        return math.nan if any(map(math.isnan, curve)) else max([0.0, *inside])

    def best(self, name: str = ALL, *, metric: Metric = "loss") -> float:
        """Return the position of the best value; the one nearest to the end of several.

        Args:
            name: of a set.
            metric: ``loss`` or ``accuracy``.

        Returns:
            A position.

        Raises:
            UsageError: there is no such curve.
        """
        curve = self._curve(metric, name)
        sign = -1.0 if metric == "loss" else 1.0
        return max(
            (sign * v, s) for v, s in zip(curve, self.positions, strict=True) if not math.isnan(v)
        )[1]

    def gain(self, name: str = ALL, *, metric: Metric = "loss") -> float:
        """Return by how much the best point is better than the better end; at least 0.

        Args:
            name: of a set.
            metric: ``loss`` or ``accuracy``.

        Returns:
            The difference.

        Raises:
            UsageError: there is no such curve.
        """
        curve = self._curve(metric, name)
        value = curve[self.positions.index(self.best(name, metric=metric))]
        if metric == "loss":
            return min(curve[0], curve[-1]) - value
        return value - max(curve[0], curve[-1])

    def to_json(self) -> dict[str, Any]:
        """Return plain values: curves, and of each set barrier, best positions and gains.

        Returns:
            A dict.
        """
        return {
            "positions": list(self.positions),
            "distance": self.distance,
            "sets": {name: self._entry(name) for name in self.loss},
        }

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"barrier": self.barrier(name)}
        metrics: tuple[Metric, ...] = ("loss", "accuracy")
        for metric in metrics:
            curves = self.loss if metric == "loss" else self.accuracy
            if name not in curves:
                continue
            entry[metric] = list(curves[name])
            entry[f"best_{metric}_at"] = self.best(name, metric=metric)
            entry[f"{metric}_gain"] = self.gain(name, metric=metric)
        return entry

    def _curve(self, metric: str, name: str) -> tuple[float, ...]:
        curves = {"loss": self.loss, "accuracy": self.accuracy}.get(metric, {})
        if name not in curves:
            raise UsageError(
                f"there is no {metric} of {name!r}: there are {', '.join(curves) or 'none'}"
            )
        return curves[name]


def with_mean(curves: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    """Add the mean over the sets as one more curve, unless there is one of that name.

    Args:
        curves: names of sets to a value at each position.

    Returns:
        The same, and ``all``.

    Example:
        >>> with_mean({"old": [0.0, 1.0], "new": [1.0, 1.0]})["all"]
        (0.5, 1.0)
    """
    out = {name: tuple(values) for name, values in curves.items()}
    if out and ALL not in out:
        columns = zip(*out.values(), strict=True)
        out[ALL] = tuple(math.fsum(column) / len(out) for column in columns)
    return out
