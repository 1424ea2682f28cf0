"""The flip budget: can Adam move a score across the threshold in the steps that a run has?

A score must move by the gap between its first value and the threshold. One step of Adam moves a
score by at most ``lr * rho_t`` whatever the gradients were (Cauchy-Schwarz over their history):

    rho_t = (1 - b1) / (1 - b1^t) * sqrt((1 - b2^t) / (1 - b2)) * sqrt(sum_{k<t} (b1^2 / b2)^k)

and a steady gradient moves it by exactly ``lr``. Few steps at a small rate therefore learn nothing
at all: no entry flips. (The bound is ours; rho_1 = 1, rho_63 = 1.80, rho_inf = 7.27.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from guywire.core.errors import UsageError

__all__ = ["FlipBudget", "adam_reach", "flip_budget"]


def adam_reach(step: int, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    """Return the farthest that Adam's update of a step can go, in learning rates.

    Args:
        step: 1 for the first.
        betas: Adam's.

    Returns:
        ``rho_t``.

    Raises:
        UsageError: the step is below 1, or ``beta1^2 >= beta2`` (there is no bound then).

    Example:
        >>> [round(adam_reach(t), 2) for t in (1, 63, 200)]
        [1.0, 1.8, 3.1]
    """
    first, second = betas
    if step < 1:
        raise UsageError(f"step={step}: the first step of Adam is 1")
    if not (0.0 <= first < 1.0 and 0.0 < second < 1.0 and first**2 < second):
        raise UsageError(f"betas={betas}: the bound needs beta1^2 < beta2 < 1")
    ratio = first**2 / second
    mean = (1 - first) / (1 - first**step)
    spread = math.sqrt((1 - second**step) / (1 - second))
    return mean * spread * math.sqrt((1 - ratio**step) / (1 - ratio))


@dataclass(frozen=True)
class FlipBudget:
    """What a schedule of learning rates can do to scores.

    Attributes:
        gap: how far a score must move.
        total: the sum of the learning rates: how far a steady gradient moves a score.
        reach: what no gradients can exceed.
        steady: the step at which a steady gradient has crossed the gap; ``None`` if it never does.
    """

    gap: float
    total: float
    reach: float
    steady: int | None

    @property
    def possible(self) -> bool:
        """Whether any score can flip at all."""
        return self.reach >= self.gap


def flip_budget(
    rates: Iterable[float], *, gap: float = 5e-3, betas: tuple[float, float] = (0.9, 0.999)
) -> FlipBudget:
    """Work out what a schedule of learning rates can do to scores under Adam.

    Args:
        rates: the learning rate of every step.
        gap: first value of the scores less the threshold.
        betas: Adam's.

    Returns:
        The budget.

    Raises:
        UsageError: the gap is not positive, a rate is negative, or Adam has no bound.

    Example:
        >>> flip_budget([8e-5] * 100).steady
        63
        >>> flip_budget([1e-5] * 60).possible  # this run would learn nothing
        False
    """
    if not gap > 0.0:
        raise UsageError(f"gap={gap} must be positive: scores begin above the threshold")
    total, reach, steady = 0.0, 0.0, None
    for step, rate in enumerate(rates, 1):
        if not 0.0 <= rate < math.inf:
            raise UsageError(f"the learning rate of step {step} is {rate}: it must be at least 0")
        total += rate
        reach += rate * adam_reach(step, betas)
        # Sums of floats: 50 steps of 1e-4 are 5e-3, not a rounding error less.
        if steady is None and total >= gap * (1 - 1e-9):
            steady = step
    return FlipBudget(gap, total, reach, steady)
