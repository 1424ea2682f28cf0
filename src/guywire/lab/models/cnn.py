"""``cnn`` and ``resnet18``: a residual network for images of 8 to 64 pixels.

The layout is ResNet-18's (He et al., arXiv 1512.03385) with a 3x3 stem and no pooling before the
first stage, as usual for small images, and with GroupNorm: no running statistics that drift from
task to task by themselves, and no statistics that tie the samples of a batch together.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

__all__ = ["CNN"]

_STAGES = 4
_LARGE = 40


class CNN(nn.Module):
    """Four stages of two residual blocks with GroupNorm.

    Args:
        shape: of an image, ``(C, H, W)``; beyond 40 pixels the stem halves it.
        base: channels of the first stage, doubled in each that follows: 20 makes the slim network
            of the rehearsal literature (1.1M parameters), 64 ResNet-18's own (11M).

    Example:
        >>> net = CNN((1, 8, 8), base=20)
        >>> net.width, round(sum(p.numel() for p in net.parameters()) / 1e6, 1)
        (160, 1.1)
    """

    def __init__(self, shape: tuple[int, int, int], base: int = 20) -> None:
        super().__init__()
        stride = 2 if min(shape[1:]) > _LARGE else 1
        self.width = base * 2 ** (_STAGES - 1)
        self.stem = nn.Conv2d(shape[0], base, 3, stride=stride, padding=1, bias=False)
        self.norm = _norm(base)
        blocks, inside = [], base
        for stage in range(_STAGES):
            outside = base * 2**stage
            blocks += [_Block(inside, outside, 1 if stage == 0 else 2), _Block(outside, outside, 1)]
            inside = outside
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return features.

        Args:
            x: images, ``[B, C, H, W]``.

        Returns:
            ``[B, width]``.
        """
        x = self.norm(self.stem(x)).relu()
        return self.blocks(x).mean((2, 3))


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(outside)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = _norm(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride=stride, bias=False), _norm(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.first(x)).relu()
        return (self.norm2(self.second(y)) + self.shortcut(x)).relu()


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)
