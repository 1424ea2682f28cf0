"""The pictures: drawings of emoji in four styles, whole emoji held out, and words for their texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from guywire.core.errors import DataError, need
from guywire.lab.streams.images import decode

__all__ = ["KNOWN", "LINE", "NEW", "Pictures", "Words", "augmented", "read", "shown"]

KNOWN = ("noto", "twemoji")
"""The styles of pretraining."""

NEW = "openmoji"
"""The style that is new: coloured, with black outlines."""

LINE = "openmoji-line"
"""A style that is farther away: black lines on white."""

_PAD, _UNKNOWN, _END = 0, 1, 3


@dataclass(frozen=True)
class Pictures:
    """All drawings in memory.

    Attributes:
        images: ``[N, 3, side, side]``, uint8.
        style: ``[N]``, number of the style in ``styles``.
        emoji: ``[N]``, number of the emoji: its drawings in all styles share it.
        group: ``[N]``, number of the subgroup in ``groups``.
        styles: names.
        groups: names of subgroups.
        captions: by emoji.
    """

    images: Tensor
    style: Tensor
    emoji: Tensor
    group: Tensor
    styles: tuple[str, ...]
    groups: tuple[str, ...]
    captions: tuple[str, ...]

    def rows(
        self, *, styles: Sequence[str], emoji: Tensor | None = None, groups: Sequence[int] = ()
    ) -> Tensor:
        """Return the numbers of some drawings, in order.

        Args:
            styles: in which styles.
            emoji: of which emoji; all if ``None``.
            groups: of which subgroups; all if empty.

        Returns:
            ``[rows]``.
        """
        keep = torch.isin(self.style, torch.tensor([self.styles.index(s) for s in styles]))
        if emoji is not None:
            keep &= torch.isin(self.emoji, emoji)
        if groups:
            keep &= torch.isin(self.group, torch.tensor(list(groups)))
        return keep.nonzero().squeeze(1)


def read(path: Path, side: int) -> Pictures:
    """Read the drawings and scale them.

    Args:
        path: ``renditions.parquet``.
        side: of the squares, a divisor of the drawings' own.

    Returns:
        The pictures.

    Raises:
        DataError: the file is not there, or the side does not divide.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}: set GUYWIRE_DATA to the folder of renditions.parquet")
    table = need("pyarrow.parquet", extra="cli").read_table(
        path, columns=["image", "style", "codepoint", "caption", "subgroup"]
    )
    columns: dict[str, list[Any]] = table.to_pydict()
    images = []
    for start in range(0, len(columns["image"]), 256):
        some = [
            decode(data, f"drawing {start + i}")
            for i, data in enumerate(columns["image"][start : start + 256])
        ]
        # Line drawings may be stored as grey.
        full = np.stack([np.stack([x] * 3, -1) if x.ndim == 2 else x for x in some])
        pixels = torch.from_numpy(full).permute(0, 3, 1, 2).float()
        if pixels.shape[-1] % side:
            raise DataError(f"drawings of {pixels.shape[-1]} pixels cannot be {side} wide: divide")
        small = functional.avg_pool2d(pixels, pixels.shape[-1] // side)
        images.append(small.round().to(torch.uint8))
    codes = list(dict.fromkeys(columns["codepoint"]))
    captions = dict(zip(columns["codepoint"], columns["caption"], strict=True))
    styles, groups = (sorted(set(columns[c])) for c in ("style", "subgroup"))

    def numbers(values: list[str], order: list[str]) -> Tensor:
        place = {value: i for i, value in enumerate(order)}
        return torch.tensor([place[value] for value in values])

    return Pictures(
        torch.cat(images),
        numbers(columns["style"], styles),
        numbers(columns["codepoint"], codes),
        numbers(columns["subgroup"], groups),
        tuple(styles),
        tuple(groups),
        tuple(captions[code] for code in codes),
    )


def shown(images: Tensor) -> Tensor:
    """Return what the network sees.

    Args:
        images: uint8.

    Returns:
        float32 of the same shape, from -1 (white, as paper mostly is) to 1.
    """
    return 1.0 - images.float() / 127.5


def augmented(images: Tensor, generator: torch.Generator, most: int = 3) -> Tensor:
    """Mirror half of the images and shift each by some pixels; paper comes in from the edges.

    Args:
        images: ``[B, C, H, W]``, uint8.
        generator: of the draws.
        most: pixels.

    Returns:
        The same shape and type.
    """
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    padded = functional.pad(images, [most] * 4, value=255)
    y, x = torch.randint(2 * most + 1, (2, count), generator=generator)
    rows = y.view(-1, 1) + torch.arange(height)
    columns = x.view(-1, 1) + torch.arange(width)
    one = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class Words:
    """A word-level tokenizer.

    Args:
        words: those it knows; others become one unknown word.
        length: of all texts, padded or cut.
    """

    def __init__(self, words: Sequence[str], length: int) -> None:
        self.words = tuple(words)
        self.length = length
        self._numbers = {word: i + _END + 1 for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts: Sequence[str], length: int) -> Words:
        """Make one that knows the words of some texts.

        Args:
            texts: the texts.
            length: of all texts.

        Returns:
            The tokenizer.
        """
        return cls(sorted({word for text in texts for word in _split(text)}), length)

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return len(self.words) + _END + 1

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize.

        Args:
            texts: the texts.

        Returns:
            ``input_ids`` and ``attention_mask``, ``[texts, length]``.
        """
        rows = []
        for text in texts:
            ids = [self._numbers.get(word, _UNKNOWN) for word in _split(text)]
            ids = [*ids[: self.length - 1], _END]
            rows.append(ids + [_PAD] * (self.length - len(ids)))
        numbers = torch.tensor(rows)
        return {"input_ids": numbers, "attention_mask": (numbers != _PAD).long()}


def _split(text: str) -> list[str]:
    return re.findall(r"[\w#*&]+", text.lower())
