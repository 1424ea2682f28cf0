"""From the words after ``--track`` to trackers."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from guywire.core.errors import UsageError
from guywire.lab.tracking.events import Tracker

__all__ = ["TRACKERS", "make"]


def _mlflow() -> Tracker:
    from guywire.lab.tracking.mlflow import MLflow

    return MLflow()


def _tensorboard() -> Tracker:
    from guywire.lab.tracking.tensorboard import TensorBoard

    return TensorBoard()


def _trackio() -> Tracker:
    from guywire.lab.tracking.trackio import Trackio

    return Trackio()


TRACKERS = {"mlflow": _mlflow, "tensorboard": _tensorboard, "trackio": _trackio}
"""Names to what makes the tracker."""


def make(words: Iterable[str]) -> dict[str, Tracker]:
    """Make the trackers that were asked for.

    Args:
        words: names of :data:`TRACKERS`, or ``package.module:Class`` for one's own.

    Returns:
        Names to trackers.

    Raises:
        UsageError: there is no such tracker, or the class has no method ``log``.
        MissingExtraError: its package is not installed.

    Example:
        >>> make(["wandb"])
        Traceback (most recent call last):
            ...
        guywire.core.errors.UsageError: there is no tracker 'wandb': write mlflow, tensorboard, trackio, or package.module:Class for one of your own
    """
    return {word: TRACKERS[word]() if word in TRACKERS else _own(word) for word in words}


def _own(word: str) -> Tracker:
    module, colon, name = word.partition(":")
    if not colon or not module or not name.isidentifier():
        raise UsageError(
            f"there is no tracker {word!r}: write {', '.join(TRACKERS)}, or package.module:Class "
            "for one of your own"
        )
    try:
        made: Any = getattr(importlib.import_module(module), name)()
    except Exception as error:  # it is somebody else's code
        raise UsageError(
            f"the tracker {word!r} cannot be made ({type(error).__name__}: {error}): it must be a "
            "class in an importable module (installed, or on PYTHONPATH) whose constructor takes "
            "nothing"
        ) from error
    if not isinstance(made, Tracker):
        raise UsageError(f"the tracker {word!r} has no method log(event): give it one")
    return made
