"""Which positions of a layer's output belong to which sample.

A layer may see its batch in dimension 0, in another one (sequence first), or folded with positions
([N * T, ...] or [T * N, ...]); or not at all, such as an embedding of positions that is added to
every sample. Sizes alone do not tell (a batch of 8 sequences of 8), so the model runs once on one
sample of the batch, and shapes, and where positions are folded values, are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Layout", "expand", "find_layout", "splits_positions"]


@dataclass(frozen=True)
class Layout:
    """How tensors of one layer call divide into samples.

    Args:
        kind: ``pure`` (a dimension is the batch), ``sample`` or ``position`` (a dimension holds both,
            samples or positions outermost), ``alone`` (everything belongs to the only sample),
            ``shared`` (no batch), ``unknown``.
        dim: that dimension.
    """

    kind: str
    dim: int = 0

    @property
    def usable(self) -> bool:
        """Whether samples can be told apart."""
        return self.kind in ("pure", "sample", "position", "alone")

    def fits(self, shape: torch.Size, n: int) -> bool:
        """Say whether a tensor of this shape can have this layout, with n samples."""
        if self.kind in ("alone", "shared", "unknown"):
            return True
        if self.dim >= len(shape):
            return False
        size = shape[self.dim]
        return size == n if self.kind == "pure" else size % n == 0

    def split(self, x: Tensor, n: int) -> Tensor:
        """Return a tensor as ``[n, positions, *other dimensions]``."""
        if self.kind == "alone":
            return x.unsqueeze(0)
        x = x.movedim(self.dim, 0)
        if self.kind == "pure":
            return x.unsqueeze(1)
        if self.kind == "sample":
            return x.unflatten(0, (n, -1))
        return x.unflatten(0, (-1, n)).transpose(0, 1)


def find_layout(whole: Tensor, one: Tensor, n: int) -> Layout:
    """Find the layout of a layer's output from a batch, and from its first sample alone.

    Args:
        whole: the output for n samples, n > 1.
        one: the output for the first of them.
        n: the number of samples.

    Returns:
        The layout.
    """
    if whole.dim() != one.dim():
        return Layout("unknown")
    differ = [d for d in range(whole.dim()) if whole.shape[d] != one.shape[d]]
    if not differ:
        return Layout("shared")
    dim = differ[0]
    k = one.shape[dim]
    if len(differ) > 1 or k == 0 or whole.shape[dim] != k * n:
        return Layout("unknown")
    if k == 1:
        return Layout("pure", dim)
    w, o = whole.detach().movedim(dim, 0), one.detach().movedim(dim, 0)
    by_sample, by_position = _close(w[:k], o), _close(w[::n], o)
    if by_sample == by_position:
        return Layout("unknown")
    return Layout("sample" if by_sample else "position", dim)


def splits_positions(module: Any, layout: Layout, output: Tensor) -> bool:
    """Say whether the batch lies in a dimension over which the layer's weights are shared."""
    if layout.kind == "alone":
        return True
    if isinstance(module, nn.modules.conv._ConvNd | nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
        return layout.dim == 0
    features = len(module.normalized_shape) if hasattr(module, "normalized_shape") else 1
    return layout.dim < output.dim() - features


def expand(x: Tensor, n: int) -> Tensor:
    """Give each of n samples a view of what they share."""
    if x.dim() and x.shape[0] == 1:
        return x.expand(n, *x.shape[1:])
    return x.unsqueeze(0).expand(n, *x.shape)


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() <= 1e-3 * scale + 1e-12).all())
