"""The edits of a stride where many weights survive, without lists of positions.

At a rate of 0.9 it costs more to list the survivors of a ranking (a branch for each weight, that no
processor foresees) than to compute with all weights and to put the results in place by bits. The
values are those of :mod:`~guywire.methods.merging.edits`, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from guywire.methods.merging._limits import Limit, magnitude_bits

_SIGN = np.int32(-(1 << 31))
_INFINITE = 0x7F800000  # the bits of infinity; those of NaN are larger
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def prune(delta: Tensor, limit: Limit, ties: int) -> tuple[Tensor, np.ndarray, int]:
    """Set the changes that a limit drops to 0.

    Args:
        delta: changes of a stride, float32, ``[n]``.
        limit: tells which are kept.
        ties: how many of those that are equal to it may be kept.

    Returns:
        What is kept of the changes, float32, ``[n]``; where that is, bool, ``[n]``; and how many
        equal ones may be kept after the stride.
    """
    if not 0 < limit.bits < _INFINITE:  # magnitudes that no threshold among numbers tells apart
        where, ties = limit.first(delta, ties)
        kept = np.zeros(len(delta), dtype=np.bool_)
        kept[where.numpy()] = True
        return torch.zeros_like(delta).index_copy_(0, where, delta[where]), kept, ties
    above, equal, ties = limit.split(magnitude_bits(delta), ties) if ties else (limit.bits, (), 0)
    pruned = hardshrink(delta, float(np.int32(above).view(np.float32)))
    if len(equal):
        pruned[equal] = delta[equal]
    # What is kept is not 0. (torch takes eight times as long to compare.)
    return pruned, pruned.numpy() != 0, ties


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
        base: pretrained values in their own type or wider, ``[n]``.
        deltas: what is kept of each change, 0 elsewhere, float32, ``[n]``; they are overwritten.
        weights: of each, not negative, not all 0.
        scale: of the mean.

    Returns:
        float32, ``[n]``; of use where a change is kept.
    """
    sums = torch.zeros(len(base))  # which makes sums of negative zeros positive
    for delta, weight in zip(deltas, weights, strict=True):
        sums += delta if weight == 1.0 else delta * weight
    if not math.isfinite(float(sums.sum())):
        return _elected_anyhow(base, deltas, weights, scale, sums.numpy() >= 0)
    # Turned by the elected sign, what agrees is positive.
    sign = sums.view(torch.int32).numpy()
    np.bitwise_and(sign, _SIGN, out=sign)
    share = total = None
    for delta, weight in zip(deltas, weights, strict=True):
        _turn(delta, sign)
        votes = delta.clamp_min_(0.0).sign()
        if weight != 1.0:
            votes *= weight
            delta *= weight
        share = votes if share is None else share.add_(votes)
        total = delta if total is None else total.add_(delta)
    assert share is not None
    assert total is not None
    total /= share.clamp_min_(min(w for w in weights if w > 0.0))  # no votes: the mean is 0
    _turn(total, sign)
    return (total if scale == 1.0 else total.mul_(scale)).add_(base)


def _elected_anyhow(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    scale: float,
    plus: np.ndarray,
) -> Tensor:
    """The same where changes may be infinite or NaN, which takes more than twice as long."""
    share, total = torch.zeros(len(base)), torch.zeros(len(base))
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
    share += _ones(share.numpy() == 0)
    return total.div_(share).mul_(scale).add_(base)


def put(out: Tensor, kept: Sequence[np.ndarray], values: Tensor) -> None:
    """Write values where any model keeps a change.

    Args:
        out: of any type, ``[n]``; edited in place.
        kept: of each model, bool, ``[n]``.
        values: ``[n]``.
    """
    where = kept[0]
    for other in kept[1:]:
        where = where | other
    whole = _INTEGERS[out.dtype.itemsize]
    new, old = (v.view(whole).numpy() for v in (values.to(out.dtype, copy=True), out))
    bits = where.view(np.int8).astype(new.dtype)  # 1, and -1 is all bits
    np.negative(bits, out=bits)
    new ^= old
    new &= bits
    old ^= new


def _turn(values: Tensor, sign: np.ndarray) -> None:
    """Change the signs of values where a bit is set, in place."""
    bits = values.view(torch.int32).numpy()
    np.bitwise_xor(bits, sign, out=bits)


def _ones(mask: np.ndarray) -> Tensor:
    """1 where a mask is true, float32; by way of bytes, which torch converts faster than booleans."""
    return torch.from_numpy(mask.view(np.uint8)).float()
