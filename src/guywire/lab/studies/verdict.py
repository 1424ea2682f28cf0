"""From numbers to a verdict, by rules that a study writes down before the numbers exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from guywire.lab.studies.statistics import Interval

__all__ = ["FEWEST_SEEDS", "Judgement", "Verdict", "at_least", "exceeds", "points", "worst"]

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


def at_least(effect: Interval, slack: float = 0.005) -> Verdict:
    """Judge whether one thing is at least as good as another, up to a slack.

    Args:
        effect: the paired difference, positive where the claim is right.
        slack: how much worse still counts as a tie.

    Returns:
        *reproduced* if the mean lies above ``-slack``; *not reproduced* if the whole interval lies
        below it; else, and with fewer than three seeds, *inconclusive*.

    Example:
        >>> at_least(Interval(0.0, -0.01, 0.01, {0: -0.01, 1: 0.0, 2: 0.01}))
        'reproduced'
    """
    if effect.n < FEWEST_SEEDS or effect.low is None or effect.high is None:
        return "inconclusive"
    if effect.high < -slack:
        return "not reproduced"
    return "reproduced" if effect.mean >= -slack else "inconclusive"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict of a claim with several parts, all of which must hold.

    Args:
        verdicts: of the parts.

    Returns:
        The least favourable one.

    Example:
        >>> worst(["reproduced", "inconclusive"])
        'inconclusive'
    """
    order: tuple[Verdict, ...] = ("not reproduced", "inconclusive", "reproduced")
    return min(verdicts, key=order.index)


def points(effect: Interval) -> str:
    """Return a difference of accuracies in percentage points, with its interval.

    Args:
        effect: the difference.

    Returns:
        For instance ``+3.1 [2.0, 4.0] points``.
    """
    if effect.low is None or effect.high is None:
        return f"{100 * effect.mean:+.1f} points"
    return f"{100 * effect.mean:+.1f} [{100 * effect.low:.1f}, {100 * effect.high:.1f}] points"
