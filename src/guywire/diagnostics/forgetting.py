"""Numbers read off an accuracy matrix at task ends.

``R[i][n]`` is the accuracy on task ``n``'s test data of the model after task ``i``, for ``n <= i``;
entries above the diagonal (``None``, NaN or left out) never count. With |T_n| classes in task n:

    F^G = 1/(N-1) sum_{i=2..N} sum_{n<i} |T_n| / |T_{1:i}| (R_{n,n} - R_{i,n})      (global)
    F^L = 1/(N-1) sum_{n<N} (A_{n,n} - A_{N,n})                                      (local)

where A is R with the task given (prediction among the task's own classes). Both are lower where
less is forgotten. "Forgetting" elsewhere often means the sum of drops from one task end to the
next, which is another number: never compare the two.

Source: Smith et al., "A Closer Look at Rehearsal-Free Continual Learning", arXiv 2203.17269.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from guywire.core.errors import UsageError

__all__ = [
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "global_forgetting",
    "learning_accuracy",
    "local_forgetting",
]

Matrix = Sequence[Sequence[float | None]] | np.ndarray


def global_forgetting(matrix: Matrix, sizes: Sequence[int] | None = None) -> float:
    """Return F^G: how far every task fell, averaged over all later task ends.

    Args:
        matrix: accuracies, ``[N, N]`` or lower triangular.
        sizes: classes of each task, ``[N]``; equal if ``None``.

    Returns:
        F^G; NaN for a single task.

    Raises:
        UsageError: the matrix is not square, or has a gap below its diagonal.

    Example:
        >>> round(global_forgetting([[0.9], [0.6, 0.8], [0.3, 0.5, 0.7]]), 6)
        0.225
    """
    table = _square(matrix)
    n = len(table)
    weights = np.ones(n) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if len(weights) != n or not bool((weights > 0).all()):
        raise UsageError(f"sizes={list(weights)} must be {n} positive numbers, one a task")
    if n < 2:
        return math.nan
    total = 0.0
    for i in range(1, n):
        drops = table.diagonal()[:i] - table[i, :i]
        total += float((weights[:i] * drops).sum() / weights[: i + 1].sum())
    return total / (n - 1)


def local_forgetting(matrix: Matrix) -> float:
    """Return F^L: how far every task but the last fell until the end, with the task given.

    Args:
        matrix: task-given accuracies, ``[N, N]`` or lower triangular.

    Returns:
        F^L; NaN for a single task.

    Raises:
        UsageError: the matrix is not square, or has a gap below its diagonal.
    """
    table = _square(matrix)
    drops = (table.diagonal() - table[-1])[:-1]
    return float(drops.mean()) if len(drops) else math.nan


def forgetting(matrix: Matrix) -> float:
    """Return the mean of ``R[i][i] - R[N][i]`` over ``i < N``: F^L's formula, of any accuracies.

    Args:
        matrix: accuracies, ``[N, N]`` or lower triangular.

    Returns:
        The forgetting; NaN for a single task.

    Example:
        >>> round(forgetting([[0.9], [0.6, 0.8]]), 6)
        0.3
    """
    return local_forgetting(matrix)


def backward_transfer(matrix: Matrix) -> float:
    """Return what later tasks did to earlier ones: the negative of :func:`forgetting`.

    Args:
        matrix: accuracies, ``[N, N]`` or lower triangular.

    Returns:
        The transfer; NaN for a single task.
    """
    return -forgetting(matrix)


def average_accuracy(matrix: Matrix) -> float:
    """Return the mean of the last row: the final model over all tasks, each weighted alike.

    Args:
        matrix: accuracies, ``[N, N]`` or lower triangular.

    Returns:
        The average.
    """
    return float(_square(matrix)[-1].mean())


def learning_accuracy(matrix: Matrix) -> float:
    """Return the mean of the diagonal: each task right after it was learned.

    Args:
        matrix: accuracies, ``[N, N]`` or lower triangular.

    Returns:
        The average.
    """
    return float(_square(matrix).diagonal().mean())


def _square(matrix: Matrix) -> np.ndarray:
    n = len(matrix)
    table = np.full((n, n), np.nan)
    for i, row in enumerate(matrix):
        if not i < len(row) <= n:
            raise UsageError(
                f"row {i} of the accuracy matrix has {len(row)} entries: it needs {i + 1} to {n}"
            )
        for j, value in enumerate(row[: i + 1]):
            table[i, j] = math.nan if value is None else value
    if n == 0 or bool(np.isnan(table[np.tril_indices(n)]).any()):
        raise UsageError("the accuracy matrix has no entry, or a gap on or below its diagonal")
    return table
