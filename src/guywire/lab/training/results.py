"""From the results of trials to one table: rows, means and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from guywire.core import writing
from guywire.core.errors import need

__all__ = ["METRICS", "aggregate", "interval", "rows", "write"]

METRICS = (
    "accuracy",
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forgetting_global",
    "learning_accuracy",
    "min_acc",
    "wc_acc",
    "wf10",
    "wp10",
    "wf100",
    "wp100",
    "seconds",
    "extra_memory_mb",
)
"""Names of the summary metrics, in the order of the tables."""


def interval(values: Iterable[float | None]) -> dict[str, float | None]:
    """Return the mean over seeds with its two-sided 95% interval of Student's t.

    ``mean +- t * s / sqrt(n)`` with the sample deviation ``s`` and ``n - 1`` degrees of freedom. A
    bootstrap over three seeds covers the mean about 76% of the time where it says 95%; with three
    seeds t is 4.30, and the wide interval is what three seeds know. It is not clipped to the range
    of the measure.

    Args:
        values: one number a seed; ``None`` and NaN are left out.

    Returns:
        ``mean``, ``low``, ``high``; all ``None`` without a number, the ends ``None`` with one.

    Example:
        >>> interval([0.5, 0.5, 0.5])
        {'mean': 0.5, 'low': 0.5, 'high': 0.5}
        >>> interval([0.25])
        {'mean': 0.25, 'low': None, 'high': None}
    """
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    n = len(known)
    if n == 0:
        return {"mean": None, "low": None, "high": None}
    mean = math.fsum(known) / n
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (n - 1))
    students_t = need("scipy.stats", extra="cli").t
    half = float(students_t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def aggregate(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the seeds of each method together.

    Args:
        results: contents of ``result.json``, of finished trials.

    Returns:
        One dict a method, in the order of first appearance: ``method``, ``seeds`` (how many), and
        of every metric ``mean``, ``low`` and ``high``. Accuracies are fractions.
    """
    methods: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        methods.setdefault(result["method"], []).append(result)
    return [
        {
            "method": method,
            "seeds": len(found),
            **{name: interval(r["metrics"].get(name) for r in found) for name in METRICS},
        }
        for method, found in methods.items()
    ]


def rows(results: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Lay results out as the columns of ``results.parquet``.

    Args:
        results: contents of ``result.json``.

    Returns:
        ``method``, ``seed``, ``trained``, ``evaluated``, ``metric``, ``value``: the accuracy matrix,
        then each summary metric with the last task as ``trained`` and -1 as ``evaluated``.
    """
    table: list[tuple[Any, ...]] = []
    for result in results:
        key = (result["method"], result["seed"])
        matrix = result["accuracy_matrix"]
        for trained, row in enumerate(matrix):
            for evaluated, value in enumerate(row):
                if value is not None:
                    table.append((*key, trained, evaluated, "accuracy", value))
        for name in METRICS:
            table.append((*key, len(matrix) - 1, -1, name, result["metrics"].get(name)))
    names = ("method", "seed", "trained", "evaluated", "metric", "value")
    return {name: [row[i] for row in table] for i, name in enumerate(names)}


def write(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write ``results.parquet``.

    Args:
        path: the file.
        results: contents of ``result.json``.

    Raises:
        CheckpointError: it cannot be written.
    """
    writing.write_parquet(path, rows(results))
