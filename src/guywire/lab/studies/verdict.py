"""From numbers to a verdict, by rules that a study writes down before the numbers exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guywire.lab.studies.statistics import Interval

__all__ = ["FEWEST_SEEDS", "Judgement", "Verdict", "exceeds"]

Verdict = Literal["reproduced", "not reproduced", "inconclusive", "smoke"]

FEWEST_SEEDS = 3
"""With fewer seeds no rule says more than *inconclusive*."""


@dataclass(frozen=True)
class Judgement:
    """What a claim's rule makes of the numbers.

    Attributes:
        verdict: *reproduced*, *not reproduced* or *inconclusive*.
        allows: the sentence that the numbers allow.
    """

    verdict: Verdict
    allows: str


def exceeds(effect: Interval, threshold: float, *, every_seed: bool = True) -> Verdict:
    """Judge whether an effect is at least as large as a claim needs.

    *Reproduced*: the mean reaches the threshold, and every seed has the sign of the claim.
    *Not reproduced*: the whole 95% interval lies below the threshold.
    *Inconclusive*: anything between, fewer than three seeds, or numbers that are not finite.

    Args:
        effect: positive where the claim is right.
        threshold: the smallest effect that counts, at least 0.
        every_seed: ask for a positive effect in every seed.

    Returns:
        The verdict.

    Example:
        >>> exceeds(Interval(0.3, 0.2, 0.4, {0: 0.2, 1: 0.3, 2: 0.4}), 0.1)
        'reproduced'
    """
    if effect.n < FEWEST_SEEDS or effect.low is None or effect.high is None:
        return "inconclusive"
    if effect.high < threshold:
        return "not reproduced"
    signs = all(value > 0.0 for value in effect.values.values())
    if effect.mean >= threshold and (signs or not every_seed):
        return "reproduced"
    return "inconclusive"
