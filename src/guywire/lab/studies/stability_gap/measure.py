"""From curves to numbers: how far the first task falls after a switch, and what its gradients do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from guywire.diagnostics import GradientSplit

__all__ = ["Fall", "fall", "share_at_start", "switch_means"]

FIRST, FOLLOWING = 3, 50
"""Steps over which the stability gradient is averaged, and among which its peak is sought."""


class Fall(NamedTuple):
    """What happens to one task when others are learned, averaged over switches.

    Attributes:
        drop: accuracy before a switch less its lowest in the steps after it (0 where it rises).
        regained: rise from that lowest value to the end of the new task, as a share of the drop;
            NaN where nothing fell.
        lowest_after: updates from the switch to the lowest value.
        half_after: updates from the switch until half the drop is regained; the length of the task
            where it never is.
    """

    drop: float
    regained: float
    lowest_after: float
    half_after: float


def fall(curve: Mapping[int, float], switches: Sequence[int], length: int, steps: int) -> Fall:
    """Measure drops of a task after switches.

    Args:
        curve: updates done to accuracy.
        switches: the updates at which other tasks begin.
        length: updates that each of those tasks lasts.
        steps: how many steps after a switch are searched for the lowest value.

    Returns:
        Means over the switches; shares are of summed drops.

    Example:
        >>> curve = {2: 0.9, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8}
        >>> found = fall(curve, [2], 4, 2)
        >>> round(found.drop, 6), round(found.regained, 6), found.half_after
        (0.4, 0.75, 3.0)
    """
    drops, risen, lowest, half = [], [], [], []
    for begin in switches:
        after = {n: curve[n] for n in sorted(curve) if begin < n <= begin + length}
        near = {n: a for n, a in after.items() if n <= begin + steps}
        at = min(near, key=lambda n: near[n])
        drop = max(0.0, curve[begin] - near[at])
        back = [n for n, a in after.items() if n >= at and a >= near[at] + drop / 2]
        drops.append(drop)
        risen.append(after[begin + length] - near[at] if drop > 0 else 0.0)
        lowest.append(at - begin)
        half.append((back[0] if back else begin + length) - begin)
    count, total = len(drops), sum(drops)
    return Fall(
        total / count,
        sum(risen) / total if total > 0 else math.nan,
        sum(lowest) / count,
        sum(half) / count,
    )


def share_at_start(splits: Mapping[int, GradientSplit]) -> tuple[float, float]:
    """Return the stability gradient just after one switch, and its peak in the steps that follow.

    Args:
        splits: updates since the switch to the gradients before the next one.

    Returns:
        The mean norm over the first three steps, the largest of the fifty after those.
    """
    start = [split.stability for n, split in splits.items() if n < FIRST]
    later = [split.stability for n, split in splits.items() if FIRST <= n < FIRST + FOLLOWING]
    return sum(start) / len(start), max(later)


def switch_means(
    splits: Sequence[Mapping[int, GradientSplit]],
) -> dict[int, tuple[float, float]]:
    """Average both norms over switches.

    Args:
        splits: of each switch, updates since it to gradients.

    Returns:
        Updates since a switch to the mean norms ``(plasticity, stability)``.
    """
    shared = sorted(set.intersection(*(set(one) for one in splits))) if splits else []
    return {
        n: (
            sum(one[n].plasticity for one in splits) / len(splits),
            sum(one[n].stability for one in splits) / len(splits),
        )
        for n in shared
    }
