"""The forgetting law: how the loss on old data grows with the amount of fine-tuning.

    loss(D) = base + A D^b + E        A: amplitude, b: exponent, E: offset

The paper has the amplitude divided by a power of the model's size, which is fixed here. It says that
the method lowers A and E and leaves the exponents about the same, so all arms share b.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from guywire.core.errors import UsageError, need

__all__ = ["LARGEST", "SMALLEST", "forgetting_law"]

SMALLEST, LARGEST = 0.01, 3.0
"""Bounds of the exponent."""


def forgetting_law(
    amounts: Sequence[float], rises: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float, float]]:
    """Fit amplitude and offset of each arm, and one exponent for all.

    Args:
        amounts: D, as shares of the largest, so that amplitudes are rises of the loss.
        rises: arm to the loss less that of the base model, at each amount.

    Returns:
        Arm to A (at least 0), b in [0.01, 3] and E.

    Raises:
        UsageError: there are fewer numbers than unknowns.

    Example:
        >>> d = [0.1, 0.3, 0.6, 1.0]
        >>> fit = forgetting_law(
        ...     d, {"a": [0.2 * x**0.5 for x in d], "b": [0.1 * x**0.5 for x in d]}
        ... )
        >>> [round(value, 3) + 0.0 for value in fit["b"]]
        [0.1, 0.5, 0.0]
    """
    arms = list(rises)
    if len(arms) * len(amounts) < 2 * len(arms) + 1:
        raise UsageError(f"{len(amounts)} amounts of {len(arms)} arms are too few for a fit")
    curve_fit = need("scipy.optimize", extra="cli").curve_fit
    x = np.tile(np.asarray(amounts, dtype=float), len(arms))
    which = np.repeat(np.arange(len(arms)), len(amounts))
    y = np.concatenate([np.asarray(rises[arm], dtype=float) for arm in arms])

    def law(_: object, b: float, *rest: float) -> np.ndarray:
        amplitude, offset = np.asarray(rest[: len(arms)]), np.asarray(rest[len(arms) :])
        return amplitude[which] * x**b + offset[which]

    start = [0.5, *(max(float(rises[arm][-1]), 1e-3) for arm in arms), *(0.0 for _ in arms)]
    low = [SMALLEST, *(0.0 for _ in arms), *(-np.inf for _ in arms)]
    high = [LARGEST, *(np.inf for _ in arms), *(np.inf for _ in arms)]
    found, _ = curve_fit(law, x, y, p0=start, bounds=(low, high), max_nfev=20_000)
    n = len(arms)
    return {
        arm: (float(found[1 + i]), float(found[0]), float(found[1 + n + i]))
        for i, arm in enumerate(arms)
    }
