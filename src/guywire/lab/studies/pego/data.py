"""Emoji in four styles of drawing: which are for pretraining, and which for the task.

Every emoji stands here once in each style, and whole emoji go to one side of every split, so that a
drawing that is tested was never seen in any style. Of emoji that look alike to the last pixel in some
style one is kept. There are two kinds of subgroups:

- those of the *task*: every second one among the subgroups of 20 or more emoji, by size. Pretraining
  never sees them, neither their emoji nor their names;
- all others are for *pretraining*, in all four styles. This is what makes the start general, as the
  paper's CLIP has seen paintings and sketches of other things than those of its test domains.

A style is "unseen" in the sense of the paper: no drawing of it is in the fine-tuning, nor in the
validation data by which strengths and rates are chosen.

Test emoji are the same for all seeds; what remains is cut into training and validation anew for
each seed. So what strengths are chosen on is never tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from guywire.core.errors import DataError, need
from guywire.lab.streams import data_folder
from guywire.lab.streams.images import decode

__all__ = ["STYLES", "Emoji", "Parts", "augmented", "floats", "parts", "read"]

STYLES = ("noto", "twemoji", "openmoji", "openmoji-line")

_LARGE = 20
_TEST_SEED = 20261124


@dataclass(frozen=True, eq=False)
class Emoji:
    """Some emoji in all styles.

    Attributes:
        images: uint8 ``[emoji, style, 3, side, side]``.
        labels: number of the subgroup, ``[emoji]``.
        names: of the subgroups.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, at: Tensor) -> Emoji:
        """Return some of the emoji.

        Args:
            at: their numbers.

        Returns:
            The same subgroups, fewer emoji.
        """
        return Emoji(self.images[at], self.labels[at], self.names)

    def style(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the drawings of one style.

        Args:
            number: of the style.

        Returns:
            Images ``[emoji, 3, side, side]`` and labels.
        """
        return self.images[:, number], self.labels


@dataclass(frozen=True, eq=False)
class Parts:
    """What one seed works with.

    Attributes:
        train: of the task.
        valid: of the task, to choose by.
        test: of the task, the same for all seeds.
        old: of the pretraining, seen by it.
        old_test: of the pretraining's subgroups, unseen by it.
    """

    train: Emoji
    valid: Emoji
    test: Emoji
    old: Emoji
    old_test: Emoji


def parts(settings: Mapping[str, Any], seed: int) -> Parts:
    """Cut the emoji of the task and of pretraining into their parts.

    Args:
        settings: ``side``, ``most_per_class``, ``test_fraction``, ``valid_fraction``.
        seed: cuts training from validation; tests do not depend on it.

    Returns:
        The parts.
    """
    task, old = read(settings["side"], settings["most_per_class"])
    rest, test = _cut(task, settings["test_fraction"], _TEST_SEED)
    train, valid = _cut(rest, settings["valid_fraction"], seed)
    seen, unseen = _cut(old, 0.2, _TEST_SEED)
    return Parts(train, valid, test, seen, unseen)


@lru_cache(maxsize=1)
def read(side: int, most: int) -> tuple[Emoji, Emoji]:
    """Read the drawings, the task's and the others.

    Args:
        side: of the images, in pixels.
        most: emoji a subgroup of the task, the first in order of code points.

    Returns:
        The emoji of the task, and those for pretraining.

    Raises:
        DataError: the file is missing.
    """
    need("pyarrow", extra="cli")
    import pyarrow.parquet as pq

    path = data_folder() / "renditions.parquet"
    if not path.is_file():
        raise DataError(f"{path} is missing: set GUYWIRE_DATA to the folder that holds it")
    columns = ["image", "style", "codepoint", "subgroup"]
    drawings: dict[str, dict[str, Tensor]] = {}
    subgroup: dict[str, str] = {}
    for row in pq.read_table(path, columns=columns).to_pylist():
        image = _pixels(row["image"], row["codepoint"], side)
        drawings.setdefault(row["codepoint"], {})[row["style"]] = image
        subgroup[row["codepoint"]] = row["subgroup"]
    members: dict[str, list[str]] = {}
    for codepoint in _distinct(drawings):
        members.setdefault(subgroup[codepoint], []).append(codepoint)
    by_size = sorted(members, key=lambda name: (-len(members[name]), name))
    chosen = [name for name in by_size if len(members[name]) >= _LARGE][1::2]
    task = {name: members[name][:most] for name in chosen}
    # A single emoji can be learnt but not tested.
    old = {n: m for n, m in members.items() if n not in task and len(m) >= 2}
    return _emoji(task, drawings), _emoji(old, drawings)


def floats(images: Tensor) -> Tensor:
    """Return images as the network takes them: white is 0, black -2.

    Args:
        images: uint8.

    Returns:
        float32 of the same shape.
    """
    return images.float() / 127.5 - 2.0


def augmented(images: Tensor, generator: torch.Generator, most: int = 3) -> Tensor:
    """Mirror half of the images and shift each by some pixels; white comes in from the edges.

    Args:
        images: float32 ``[N, 3, H, W]``, white is 0.
        generator: draws.
        most: pixels to shift.

    Returns:
        Images of the same shape.
    """
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    padded = torch.nn.functional.pad(images, [most] * 4)
    y, x = torch.randint(2 * most + 1, (2, count), generator=generator)
    rows = y.view(-1, 1) + torch.arange(height)
    columns = x.view(-1, 1) + torch.arange(width)
    one = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _pixels(data: bytes, where: str, side: int) -> Tensor:
    array = torch.from_numpy(decode(data, where, side))
    return array.permute(2, 0, 1) if array.dim() == 3 else array.expand(3, -1, -1)


def _distinct(drawings: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Leave out emoji that lack a style, or share a drawing with one before.

    Some emoji differ in their code point and look the same in one style or more, in line drawings
    those that differ in colour only. Left in, one would be tested that was trained on.
    """
    kept: list[str] = []
    seen: set[bytes] = set()
    for codepoint in sorted(drawings):
        pixels = {image.contiguous().numpy().tobytes() for image in drawings[codepoint].values()}
        if len(drawings[codepoint]) == len(STYLES) and not pixels & seen:
            kept.append(codepoint)
            seen |= pixels
    return kept


def _emoji(members: Mapping[str, list[str]], drawings: Mapping[str, Mapping[str, Tensor]]) -> Emoji:
    names = tuple(sorted(members))
    images, labels = [], []
    for number, name in enumerate(names):
        for codepoint in members[name]:
            images.append(torch.stack([drawings[codepoint][style] for style in STYLES]))
            labels.append(number)
    return Emoji(torch.stack(images), torch.tensor(labels), names)


def _cut(emoji: Emoji, fraction: float, seed: int) -> tuple[Emoji, Emoji]:
    """Hold a fraction of each subgroup out, one emoji at least."""
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for number in range(len(emoji.names)):
        mine = (emoji.labels == number).nonzero().squeeze(1)
        mine = mine[torch.randperm(len(mine), generator=generator)]
        count = max(1, round(fraction * len(mine)))
        held.append(mine[:count])
        kept.append(mine[count:])
    return emoji.subset(torch.cat(kept)), emoji.subset(torch.cat(held))
