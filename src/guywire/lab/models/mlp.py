"""``mlp``: two hidden layers, for small images."""

from __future__ import annotations

import math

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Two hidden layers with ReLU, as wide as the input within 100 to 400.

    Args:
        shape: of an image, ``(C, H, W)``.

    Example:
        >>> MLP((1, 28, 28)).width
        400
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        inputs = math.prod(shape)
        self.width = min(400, max(100, inputs))
        self.first = nn.Linear(inputs, self.width)
        self.second = nn.Linear(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features.

        Args:
            x: images, ``[B, C, H, W]``.

        Returns:
            ``[B, width]``.
        """
        x = self.first(x.flatten(1)).relu()
        return self.second(x).relu()
