"""Images in memory: draw a montage."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["montage"]


def montage(images: Tensor) -> Image.Image:
    """Draw images in rows, small ones enlarged without blur.

    Args:
        images: uint8 ``[N, C, H, W]``, with one or three channels.

    Returns:
        An RGB picture, about twice as wide as high, white between the images.
    """
    n, _, h, w = images.shape
    zoom = max(1, round(64 / max(h, w)))
    columns = max(1, min(n, math.ceil(math.sqrt(2 * n))))
    rows = max(1, math.ceil(n / columns))
    gap = 4
    cell = (h * zoom + gap, w * zoom + gap)
    sheet = np.full((rows * cell[0] + gap, columns * cell[1] + gap, 3), 255, dtype=np.uint8)
    large = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    large = large.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).to(torch.uint8).numpy()
    for i in range(n):
        top, left = gap + i // columns * cell[0], gap + i % columns * cell[1]
        sheet[top : top + h * zoom, left : left + w * zoom] = large[i]
    return Image.fromarray(sheet)
