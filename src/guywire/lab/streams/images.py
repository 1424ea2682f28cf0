"""Images in memory: decode them, bring them to one size, draw a montage."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from guywire.core.errors import DataError, UsageError

__all__ = ["check_room", "decode", "fitted", "montage", "stack"]


def decode(source: bytes | Path, where: str, size: int | None = None) -> np.ndarray:
    """Decode one image.

    Args:
        source: the bytes of a file, or its path.
        where: what to call it in errors.
        size: side of the square to which it is brought: shorter side scaled, centre cut.

    Returns:
        uint8 ``[H, W]`` if it is grey, else ``[H, W, 3]``; transparent parts are white.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            # An image that declares a gigapixel is refused, not unpacked with a warning.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                image.load()
                return _pixels(image, size)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{where} declares too many pixels: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError, TypeError) as error:
        raise DataError(f"{where} cannot be decoded as an image: {error}") from error


def _pixels(image: Image.Image, size: int | None) -> np.ndarray:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        # PIL clips 16-bit grey to 255 when it converts; keep the upper byte instead.
        image = Image.fromarray(
            (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        )
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode != "L":
        image = image.convert("L" if image.mode in ("1", "F") else "RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.array(image, dtype=np.uint8)


def stack(images: Iterable[np.ndarray], name: str) -> Tensor:
    """Put decoded images into one tensor; grey ones are repeated where some are coloured.

    Args:
        images: uint8 ``[H, W]`` or ``[H, W, 3]``, one at least.
        name: of the data, for errors.

    Returns:
        uint8 ``[N, C, H, W]`` with one channel or three.

    Raises:
        UsageError: they differ in size, or together they do not fit into memory.
    """
    arrays: list[np.ndarray] = []
    taken = 0
    for array in images:
        taken += array.nbytes
        check_room(taken, len(arrays) + 1, name)
        arrays.append(array)
    sizes = {array.shape[:2] for array in arrays}
    if len(sizes) > 1:
        low, high = min(sizes), max(sizes)
        raise UsageError(
            f"the images of {name!r} differ in size ({low[1]}x{low[0]} to {high[1]}x{high[0]}): "
            "give --image-size to bring them to one"
        )
    h, w = sizes.pop()
    channels = 3 if any(array.ndim == 3 for array in arrays) else 1
    out = np.empty((len(arrays), channels, h, w), dtype=np.uint8)
    for i, array in enumerate(arrays):
        out[i] = array.transpose(2, 0, 1) if array.ndim == 3 else array
    return torch.from_numpy(out)


def check_room(size: int, count: int, name: str) -> None:
    """Refuse images that together do not fit into memory, before they are made.

    Args:
        size: bytes.
        count: how many images.
        name: of the data, for the error.

    Raises:
        UsageError: they take more than a quarter of this machine's memory.
    """
    if size > _memory() // 4:
        raise UsageError(
            f"{count} images of {name!r} take {size / 2**30:.1f} GiB, more than a quarter of this "
            "machine's memory: give a smaller --image-size, or cap the samples a class"
        )


def fitted(images: Tensor, size: int | None) -> Tensor:
    """Bring images that are in memory already to a square size, as :func:`decode` does.

    Args:
        images: uint8 ``[N, C, H, W]``.
        size: side of the square; ``None`` leaves them.

    Returns:
        uint8 ``[N, C, size, size]``.
    """
    h, w = images.shape[-2:]
    if size is None or (h, w) == (size, size):
        return images
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = images[..., top : top + side, left : left + side]
    pieces = [
        functional.interpolate(piece.float(), (size, size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for piece in square.split(1024)
    ]
    return torch.cat(pieces)


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
    large = large.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()
    for i in range(n):
        top, left = gap + i // columns * cell[0], gap + i % columns * cell[1]
        sheet[top : top + h * zoom, left : left + w * zoom] = large[i]
    return Image.fromarray(sheet)


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every platform says
        return 16 * 2**30
