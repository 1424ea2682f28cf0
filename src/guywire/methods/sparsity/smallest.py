"""Pure functions of SaRA: masks of small entries, the nuclear norm, the learning rate, a score.

    M = 1[|P| < threshold]                      which entries of a tensor are trained
    |P_M|_* = sum_i sigma_i(P * M)              its subgradient is U V^T from the thin SVD, times M
    lr = 1e-3 exp(-350 threshold)               fitted by the authors on Stable Diffusion 1.5

Source: Hu, Yi, Tao, Zhu, Chen, Zhang, Li, "SaRA: High-Efficient Diffusion Model Fine-tuning with
Progressive Sparse Low-Rank Adaptation", arXiv 2409.06633.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from guywire.core.errors import UsageError
from guywire.core.tensors import Tensors

__all__ = [
    "nuclear_norm",
    "sara_learning_rate",
    "smallest_masks",
    "threshold_of_share",
    "vlhi",
]


def smallest_masks(params: Mapping[str, Tensor], threshold: float) -> Tensors:
    """Return, for each tensor, which entries are smaller than a threshold in absolute value.

    Args:
        params: names to tensors of any shape.
        threshold: strictly below it counts; 0 chooses nothing, infinity everything.

    Returns:
        Names to boolean masks of the same shapes.

    Raises:
        UsageError: the threshold is negative or no number.

    Example:
        >>> smallest_masks({"w": torch.tensor([0.1, -0.3, 0.0])}, 0.3)
        {'w': tensor([ True, False,  True])}
    """
    if not threshold >= 0.0:
        raise UsageError(f"the threshold is {threshold}: it must be a number of at least 0")
    return {name: p.detach().abs() < threshold for name, p in params.items()}


def threshold_of_share(params: Iterable[Tensor], share: float) -> float:
    """Return the smallest threshold below which at least a share of all entries lie.

    A bisection over the float32 numbers counts the entries below each of some thirty thresholds, so
    that nothing larger than one tensor's mask is made.

    Args:
        params: tensors of any shapes.
        share: between 0 and 1; of the entries of all tensors together.

    Returns:
        The threshold; 0 for a share of 0, infinity for 1.

    Raises:
        UsageError: the share lies outside, or there are no entries.

    Example:
        >>> weights = torch.tensor([0.1, -0.2, 0.3, 0.4])
        >>> smallest_masks({"w": weights}, threshold_of_share([weights], 0.5))
        {'w': tensor([ True,  True, False, False])}
    """
    tensors = [p.detach() for p in params]
    total = sum(p.numel() for p in tensors)
    if not 0.0 <= share <= 1.0 or total == 0:
        raise UsageError(
            f"a share of {share} of {total} entries makes no sense: give a number from 0 to 1, and "
            "select something"
        )
    if share in (0.0, 1.0):
        return math.inf if share else 0.0
    wanted = share * total

    def number(bits: int) -> float:
        return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))

    # Non-negative floats are ordered as their bits are; 0x7f800000 is infinity.
    low, high = 0, 0x7F800000
    while high - low > 1:
        middle = (low + high) // 2
        limit = number(middle)
        below = sum(int((p.abs() < limit).sum()) for p in tensors)
        low, high = (low, middle) if below >= wanted else (middle, high)
    return number(high)


def nuclear_norm(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of a matrix's singular values, and a subgradient of it.

    The subgradient is ``U V^T`` over the singular values that are not zero: of all subgradients the
    one of least norm, so a matrix of zeros has the gradient zero.

    Args:
        matrix: ``[m, n]``; half precision is computed in float32.

    Returns:
        A 0-d tensor and a tensor ``[m, n]``, without a graph.

    Raises:
        UsageError: it is no matrix.

    Example:
        >>> value, gradient = nuclear_norm(torch.diag(torch.tensor([2.0, 0.5])))
        >>> value, torch.allclose(gradient, torch.eye(2))
        (tensor(2.5000), True)
    """
    if matrix.dim() != 2:
        raise UsageError(f"a nuclear norm is of a matrix, not of shape {tuple(matrix.shape)}")
    exact = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    tiny = torch.finfo(exact.dtype).eps * max(exact.shape, default=1)
    kept = values > tiny * values.max() if values.numel() else values > 0
    return values.sum(), ((left * kept) @ right).to(matrix.dtype)


def sara_learning_rate(threshold: float) -> float:
    """Return the learning rate that the authors found for a threshold on Stable Diffusion 1.5.

    Args:
        threshold: absolute, as in ``smallest_masks``.

    Returns:
        ``1e-3 * exp(-350 * threshold)``.

    Raises:
        UsageError: the threshold is negative or no number.

    Example:
        >>> f"{sara_learning_rate(2e-3):.3g}"
        '0.000497'
    """
    if not threshold >= 0.0:
        raise UsageError(f"the threshold is {threshold}: it must be a number of at least 0")
    return 1e-3 * math.exp(-350.0 * threshold)


def vlhi(fid: Sequence[float], clip: Sequence[float]) -> list[float]:
    """Return the paper's visual-linguistic harmony index of each of several methods.

    Each of two scores is stretched to the range from 0 (worst of the group) to 1 (best), and the
    two are added; a score that all methods share counts 0.

    Args:
        fid: of each method; lower is better.
        clip: of each method; higher is better.

    Returns:
        Numbers from 0 to 2, which compare methods of this group only.

    Raises:
        UsageError: the lists are empty or of different lengths.

    Example:
        >>> vlhi([10.0, 20.0, 15.0], [0.2, 0.3, 0.3])
        [1.0, 1.0, 1.5]
    """
    if not fid or len(fid) != len(clip):
        raise UsageError(f"{len(fid)} and {len(clip)} scores: give both of each method")

    def stretched(value: float, worst: float, best: float) -> float:
        return 0.0 if worst == best else (value - worst) / (best - worst)

    return [
        stretched(f, max(fid), min(fid)) + stretched(c, min(clip), max(clip))
        for f, c in zip(fid, clip, strict=True)
    ]
