"""Models that both sides train: torch alone, so that every peer's environment can build them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp(width: int = 1000, inputs: int = 784, classes: int = 10) -> nn.Module:
    """1.8M parameters as it stands."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU()
        self.short = nn.Sequential()
        if stride > 1 or inside != out:
            self.short = nn.Sequential(
                nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.short(x))


def resnet18(width: int = 64) -> nn.Module:
    """11M parameters at width 64, for 32 x 32 pixels."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inside = width
    for times, stride in ((1, 1), (2, 2), (4, 2), (8, 2)):
        out = width * times
        layers += [Block(inside, out, stride), Block(out, out, 1)]
        inside = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10)]
    return nn.Sequential(*layers)


def samples(model: str, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and labels for ``"mlp"`` or ``"resnet18"``."""
    g = torch.Generator().manual_seed(seed)
    shape = (784,) if model == "mlp" else (3, 32, 32)
    return torch.randn(number, *shape, generator=g), torch.randint(10, (number,), generator=g)


def build(model: str, width: int) -> nn.Module:
    """Build by name, the same weights in every process."""
    torch.manual_seed(0)
    return mlp(width) if model == "mlp" else resnet18(width)


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())
