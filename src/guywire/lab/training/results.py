"""From the results of trials to one table: rows, means and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guywire.core import checkpoint

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

_RESAMPLES = 10_000


def interval(values: Iterable[float | None]) -> dict[str, float | None]:
    """Return the mean over seeds with its 95% percentile bootstrap interval.

    The resamples come from a generator with a fixed seed, so that equal numbers give equal
    intervals. Few seeds make the interval too narrow: with three it never leaves their range.

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
    known = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=np.float64)
    if len(known) == 0:
        return {"mean": None, "low": None, "high": None}
    if len(known) == 1:
        return {"mean": float(known[0]), "low": None, "high": None}
    chosen = np.random.default_rng(0).integers(len(known), size=(_RESAMPLES, len(known)))
    low, high = np.quantile(known[chosen].mean(axis=1), [0.025, 0.975])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high)}


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
    checkpoint.write_parquet(path, rows(results))
