"""Strengths that change over time, for the ``strength`` of any method.

A schedule is any callable from the number of optimiser steps done since ``attach`` to a number.
These are values with a repr, so that they survive in configurations and reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from guywire.core.errors import UsageError

__all__ = ["Falling"]


@dataclass(frozen=True)
class Falling:
    """A strength that falls linearly with the epochs, down to a floor.

    ``max(floor, start * (1 - e / epochs))`` with ``e`` epochs completed.

    Source: the released code of Naznin et al., "CSTRL: Context-Driven Sequential Transfer Learning
    for Abstractive Radiology Report Summarization", arXiv 2503.05750, with its numbers as defaults.

    Args:
        start: the strength in the first epoch.
        floor: the least strength.
        epochs: after how many epochs the line would reach zero.
        steps_per_epoch: optimiser steps in one epoch.

    Raises:
        UsageError: a number is out of range.

    Example:
        >>> falling = Falling(steps_per_epoch=100)
        >>> [round(falling(100 * e), 3) for e in (0, 5, 10, 15, 16, 20)]
        [0.9, 0.675, 0.45, 0.225, 0.2, 0.2]
    """

    start: float = 0.9
    floor: float = 0.2
    epochs: int = 20
    steps_per_epoch: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor <= self.start < float("inf"):
            raise UsageError(
                f"a strength cannot fall from {self.start} to {self.floor}: "
                "0 <= floor <= start, both finite"
            )
        if self.epochs < 1 or self.steps_per_epoch < 1:
            raise UsageError(f"{self} has no steps: epochs and steps_per_epoch must be at least 1")

    def __call__(self, step: int) -> float:
        """Return the strength at a step.

        Args:
            step: optimiser steps done.

        Returns:
            The strength.
        """
        done = step // self.steps_per_epoch
        return max(self.floor, self.start * (1.0 - done / self.epochs))
