"""Which weights of a change matter: by magnitude, by magnitude times input (WANDA), or by structure.

For large changes, where random pruning breaks at moderate rates already. What is kept by importance
is not rescaled: there is no lottery whose mean would have to be right.

Source: "DARE the Extreme", arXiv 2410.09344, section 5; WANDA is arXiv 2306.11695.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from guywire.core.errors import UsageError
from guywire.methods.merging.dare import check_rate
from guywire.methods.merging.masks import survivors

__all__ = ["magnitude_mask", "structural_survivors", "wanda_mask"]

# Elements at a time: the temporaries stay small beside an embedding of 10^8 weights.
_CHUNK = 1 << 22


def magnitude_mask(
    delta: Tensor, rate: float, *, by: Literal["tensor", "row"] = "tensor"
) -> Tensor:
    """Keep the largest changes of a tensor.

    Args:
        delta: the change, of any shape.
        rate: share that is dropped, in [0, 1).
        by: rank over the whole ``tensor``, or over each ``row`` (the first dimension).

    Returns:
        A mask of the shape of ``delta`` with exactly ``round((1 - rate) * n)`` times True, n the
        elements of the tensor or of each row. Of equal ones the first are kept.

    Raises:
        UsageError: the rate is out of range.

    Example:
        >>> magnitude_mask(torch.tensor([3.0, -5.0, 1.0, 0.0]), 0.5)
        tensor([ True,  True, False, False])
    """
    check_rate(rate)
    if by == "row":
        flat = delta.detach().abs().reshape(delta.shape[0], -1)
        return _largest_of_rows(flat, rate).view(delta.shape)
    return _largest(delta.detach().reshape(-1), round((1.0 - rate) * delta.numel())).view(
        delta.shape
    )


def wanda_mask(delta: Tensor, norms: Tensor, rate: float) -> Tensor:
    """Keep, in each output row, the changes that weigh most on the layer's inputs.

    The score is ``|delta_ij| * ||x_j||``.

    Args:
        delta: change of a linear layer's weight, ``[out, in]``.
        norms: the Euclidean norm of each input feature over calibration data, ``[in]``; only their
            ratios matter.
        rate: share that is dropped, in [0, 1).

    Returns:
        A mask ``[out, in]`` with exactly ``round((1 - rate) * in)`` times True in each row.

    Raises:
        UsageError: the rate is out of range, or the shapes do not fit.

    Example:
        >>> wanda_mask(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 1.0]), 0.5)
        tensor([[ True, False]])
    """
    check_rate(rate)
    if delta.dim() != 2 or norms.shape != delta.shape[1:]:
        raise UsageError(
            f"a change of shape {tuple(delta.shape)} and norms of shape {tuple(norms.shape)} do not "
            "fit: WANDA needs a weight [out, in] and a norm for each of its inputs"
        )
    wide = torch.promote_types(delta.dtype, torch.float32)
    rows = max(1, _CHUNK // max(1, delta.shape[1]))
    weight = norms.to(wide).abs()
    return torch.cat(
        [_largest_of_rows(d.to(wide).abs() * weight, rate) for d in delta.detach().split(rows)]
    )


def structural_survivors(
    shape: torch.Size | tuple[int, ...], rate: float, share: float, *, seed: int, name: str
) -> Tensor:
    """Draw survivors that lie in few input features of a layer only.

    A random ``share`` of the input features is kept, and inside them weights are dropped at random
    up to the total rate, so that the change is a ``[out, share * in]`` slice. Rescale as for DARE.

    Args:
        shape: of the weight, ``[out, in]``.
        rate: share of all weights that is dropped, in [0, 1).
        share: of input features that are kept, at least ``1 - rate``.
        seed: of the survivors.
        name: of the tensor.

    Returns:
        Positions in the flattened tensor, int64, increasing.

    Raises:
        UsageError: the shape is no matrix, the rate is out of range, or the share keeps too few.

    Example:
        >>> kept = structural_survivors((50, 40), 0.9, 0.25, seed=0, name="w")
        >>> len((kept % 40).unique()) <= 20
        True
    """
    check_rate(rate)
    if len(shape) != 2:
        raise UsageError(f"the shape {tuple(shape)} is no matrix [out, in]: it has no features")
    if not 1.0 - rate <= share <= 1.0:
        raise UsageError(
            f"a share of {share} of the features cannot hold the {1.0 - rate:g} of the weights that "
            f"survive a rate of {rate}: give a share in [{1.0 - rate:g}, 1]"
        )
    out, inside = shape
    columns = survivors(f"{name}#features", inside, 1.0 - share, seed)
    if not len(columns):
        return columns
    dropped = max(0.0, 1.0 - (1.0 - rate) / share)
    kept = survivors(f"{name}#inside", out * len(columns), dropped, seed)
    return kept // len(columns) * inside + columns[kept % len(columns)]


def _largest_of_rows(scores: Tensor, rate: float) -> Tensor:
    count = round((1.0 - rate) * scores.shape[1])
    # A stable sort, not topk: of equal scores the first are kept, on every device.
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, order, True)


def _largest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest magnitudes, by a radix search for the smallest of them."""
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    if count == 0:
        return mask
    if count == values.numel():
        return ~mask
    threshold = _threshold(values, count)
    left = count
    for v, m in _chunks(values, mask):
        above = _bits(v) > threshold
        m.copy_(above)
        left -= int(above.sum())
    for v, m in _chunks(values, mask):
        if left == 0:
            break
        ties = (_bits(v) == threshold).nonzero().view(-1)[:left]
        m[ties] = True
        left -= len(ties)
    return mask


def _threshold(values: Tensor, count: int) -> int:
    """Return the bits of the ``count``-th largest magnitude, 16 bits at a time.

    The bits of floats that are not negative are ordered as the floats are, so counting them by
    their leading digits needs two passes and no sorted copy (which for 10^8 weights takes
    gigabytes).
    """
    width = 64 if values.dtype == torch.float64 else 32
    prefix = 0
    for shift in range(width - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
        for (v,) in _chunks(values):
            bits = _bits(v)
            if shift < width - 16:
                bits = bits[bits >> (shift + 16) == prefix]
            counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
        from_above = counts.flip(0).cumsum(0)
        digit = int((from_above >= count).nonzero()[0])
        count -= int(from_above[digit - 1]) if digit else 0
        prefix = (prefix << 16) | (0xFFFF - digit)
    return prefix


def _bits(values: Tensor) -> Tensor:
    if values.dtype == torch.float64:
        return values.abs().view(torch.int64)
    return values.abs().float().view(torch.int32)


def _chunks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(t.split(_CHUNK) for t in tensors), strict=True)
