"""The edits of a stride where many weights survive, without lists of positions.

At a rate of 0.9 it costs more to list the survivors of a ranking (a branch for each weight, that no
processor foresees) than to compute with all weights and to put the results in place by bits. The
values are those of :mod:`~guywire.methods.merging.edits`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from guywire.methods.merging._limits import Limit, magnitude_bits

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def prune(delta: Tensor, limit: Limit, ties: int) -> tuple[np.ndarray, int]:
    """Set the changes that a limit drops to 0.

    Args:
        delta: changes of a stride, float32, ``[n]``; edited in place.
        limit: tells which are kept.
        ties: how many of those that are equal to it may be kept.

    Returns:
        -1 for the kept and 0 for the dropped, int32, ``[n]``; and how many equal ones may be kept
        after the stride.
    """
    bits = magnitude_bits(delta)
    above, equal, ties = limit.split(bits, ties)
    kept = np.subtract(np.int32(above), bits)  # neither is negative, but for a limit of -1
    np.right_shift(kept, 31, out=kept)
    kept[equal] = -1
    values = delta.view(torch.int32).numpy()
    np.bitwise_and(values, kept, out=values)
    return kept, ties


def added(base: Tensor, deltas: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Return ``base + sum_i factor_i * delta_i``, as :func:`~guywire.methods.merging.edits.add`.

    Args:
        base: pretrained values in their own type, ``[n]``.
        deltas: what is kept of each change, 0 elsewhere, float32, ``[n]``; they are overwritten.
        factors: of each.

    Returns:
        float32, ``[n]``; of use where a change is kept.
    """
    total = deltas[0].mul_(factors[0])
    if len(deltas) > 1:
        total += 0.0  # a negative zero becomes positive, as in a sum that starts with 0
    for delta, factor in zip(deltas[1:], factors[1:], strict=True):
        total += delta.mul_(factor)
    return total.add_(base)


def elected(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], scale: float
) -> Tensor:
    """Return base and elected mean, as :func:`~guywire.methods.merging.edits.elect`.

    Args:
        base: pretrained values in their own type, ``[n]``.
        deltas: what is kept of each change, 0 elsewhere, float32, ``[n]``.
        weights: of each, not negative.
        scale: of the mean.

    Returns:
        float32, ``[n]``; of use where a change is kept.
    """
    sums = torch.zeros(len(base))
    for delta, weight in zip(deltas, weights, strict=True):
        sums += delta if weight == 1.0 else delta * weight
    plus = sums.numpy() >= 0
    share, total = torch.zeros(len(base)), sums.zero_()
    for delta, weight in zip(deltas, weights, strict=True):
        values = delta.numpy()
        agrees = values > 0
        agrees &= plus
        agrees |= (values < 0) > plus
        votes = _ones(agrees)
        if weight != 1.0:
            votes *= weight
        share += votes
        total += votes.mul_(delta)
    share += _ones(share.numpy() == 0)  # no votes: the mean is 0
    return total.div_(share).mul_(scale).add_(base)


def put(out: Tensor, kept: Sequence[np.ndarray], values: Tensor) -> None:
    """Write values where any model keeps a change.

    Args:
        out: of any type, ``[n]``; edited in place.
        kept: of each model, -1 or 0, int32, ``[n]``.
        values: ``[n]``.
    """
    where = kept[0]
    for other in kept[1:]:
        where = where | other
    whole = _INTEGERS[out.dtype.itemsize]
    new, old = (v.view(whole).numpy() for v in (values.to(out.dtype, copy=True), out))
    new ^= old
    new &= where.astype(new.dtype, copy=False)
    old ^= new


def _ones(mask: np.ndarray) -> Tensor:
    """1 where a mask is true, float32; by way of bytes, which torch converts faster than booleans."""
    return torch.from_numpy(mask.view(np.uint8)).float()
