"""Means and 95% intervals over seeds, and what they allow one to say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from guywire.lab.training import results

__all__ = ["Interval", "interval"]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% confidence interval.

    Attributes:
        mean: the mean over seeds.
        low: lower end of the interval; None with fewer than two seeds.
        high: upper end of the interval; None with fewer than two seeds.
        count: how many seeds went in.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    def overlaps(self, other: Interval) -> bool:
        """Whether the two intervals share a point (a missing interval overlaps everything)."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high

    def scaled(self, factor: float) -> Interval:
        """The same interval in another unit.

        >>> interval([0.5, 0.5]).scaled(100).mean
        50.0
        """
        low = None if self.low is None else self.low * factor
        high = None if self.high is None else self.high * factor
        return Interval(self.mean * factor, low, high, self.count)


def interval(values: Iterable[float | None]) -> Interval | None:
    """Mean and two-sided 95% interval of Student's t with n - 1 degrees of freedom.

    The interval is ``mean +- t * s / sqrt(n)`` with the sample deviation ``s`` (n - 1). With three
    seeds t is 4.30, so the interval is wide; that is what three seeds know. It is not clipped to
    the range of the measure.

    Args:
        values: one number a seed; None and NaN are left out.

    Returns:
        The interval, or None when no number is left.

    Example:
        >>> found = interval([1.0, 2.0, 3.0])
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3), found.count
        (2.0, -0.484, 4.484, 3)
        >>> interval([0.5]).low is None
        True
        >>> interval([]) is None
        True
    """
    kept = [v for v in values if v is not None and not math.isnan(v)]
    found = results.interval(kept)
    if found["mean"] is None:
        return None
    return Interval(found["mean"], found["low"], found["high"], len(kept))
