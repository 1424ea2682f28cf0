"""The magnitude that the largest changes of a tensor exceed, found piece by piece.

The bits of floats that are not negative are ordered as the floats are: a count of their leading 16
bits, and of the other 15 where it matters, gives the k-th largest without a sorted copy of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Piece = tuple[int, int]
Run = Callable[[Callable[[Piece], np.ndarray | int], Sequence[Piece]], Iterable[np.ndarray | int]]

_LOW = 15


@dataclass(frozen=True)
class Limit:
    """Which magnitudes of a tensor are kept.

    Attributes:
        bits: those above are kept; -1 keeps all.
        ties: for the start of each piece, how many of those that are equal.
    """

    bits: int
    ties: dict[int, int]

    def kept(self, delta: Tensor, start: int) -> Tensor:
        """Positions in a piece, int64, increasing."""
        bits = magnitude_bits(delta)
        mask = bits > self.bits
        if ties := self.ties.get(start, 0):
            mask[(bits == self.bits).nonzero().view(-1)[:ties]] = True
        return mask.nonzero().view(-1)


def find_limit(
    delta: Callable[[Piece], Tensor], pieces: Sequence[Piece], count: int, run: Run
) -> Limit:
    """Find what keeps ``count`` weights exactly; of equal ones the first.

    Args:
        delta: gives the change of a piece.
        pieces: (start, stop), in order, of the whole tensor.
        count: how many to keep.
        run: maps a function over pieces, in order, perhaps on several threads.

    Returns:
        The limit.
    """
    numel = pieces[-1][1]
    if count >= numel:
        return Limit(-1, {})
    if count == 0:
        return Limit(0x7FFFFFFF, {})
    if len(pieces) == 1:
        bits = {pieces[0]: magnitude_bits(delta(pieces[0])).numpy()}

        def read(piece: Piece) -> np.ndarray:
            return bits[piece]
    else:

        def read(piece: Piece) -> np.ndarray:
            return magnitude_bits(delta(piece)).numpy()

    def leading(piece: Piece) -> np.ndarray:
        return np.bincount(read(piece) >> _LOW, minlength=1 << 16)

    digit, count = _digit(sum(run(leading, pieces)), count)

    def trailing(piece: Piece) -> np.ndarray:
        mine = read(piece)
        mine = mine[mine >> _LOW == digit]
        return np.bincount(mine & ((1 << _LOW) - 1), minlength=1 << _LOW)

    low, count = _digit(sum(run(trailing, pieces)), count)
    threshold = digit << _LOW | low

    def equal(piece: Piece) -> int:
        return int((read(piece) == threshold).sum())

    ties = {}
    for (start, _), here in zip(pieces, run(equal, pieces), strict=True):
        ties[start] = min(int(here), count)
        count -= ties[start]
    return Limit(threshold, ties)


def magnitude_bits(delta: Tensor) -> Tensor:
    """Return the bits of ``|delta|`` as float32, int32."""
    return delta.float().abs().view(torch.int32)


def _digit(counts: np.ndarray | int, count: int) -> tuple[int, int]:
    """The digit of the count-th largest, and how many of that digit are still wanted."""
    assert isinstance(counts, np.ndarray)
    from_above = np.cumsum(counts[::-1])
    at = int(np.searchsorted(from_above, count))
    before = int(from_above[at - 1]) if at else 0
    return len(counts) - 1 - at, count - before
