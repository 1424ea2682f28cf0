"""The magnitude that the largest changes of a tensor exceed, found piece by piece.

The bits of floats that are not negative are ordered as the floats are. A sample says between which two
magnitudes the k-th largest must lie; one pass counts what is above, and collects what is between. If
the sample misled, all magnitudes are possible again, and the pass collects in 32768 classes instead.

Passes go through a piece in strides, whose temporaries stay in the processor's cache and in memory that
was used before: for a whole piece each of them would be new pages, at ten times the cost of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Piece = tuple[int, int]
Run = Callable[[Callable[[Piece], Any], Sequence[Piece]], Iterable[Any]]

STRIDE = 1 << 17
"""Weights that are looked at together."""

_LOW = 15
_SAMPLE = 1 << 17  # of a tensor, in stretches
_STRETCH = 1024


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
        """Positions in the piece that begins at ``start``, int64, increasing."""
        return self.first(delta, self.ties.get(start, 0))[0]

    def first(self, delta: Tensor, ties: int) -> tuple[Tensor, int]:
        """Pick from a stride.

        Args:
            delta: its changes, ``[n]``.
            ties: how many equal ones may be kept.

        Returns:
            Positions in the stride, int64, increasing; and how many equal ones may be kept after it.
        """
        bits = magnitude_bits(delta)
        above, equal, ties = self.split(bits, ties)
        mask = bits > above
        mask[equal] = True
        return torch.from_numpy(np.flatnonzero(mask)), ties

    def split(self, bits: np.ndarray, ties: int) -> tuple[int, np.ndarray, int]:
        """Say what a stride keeps.

        Args:
            bits: its magnitudes', int32, ``[n]``.
            ties: how many of those equal to the limit may be kept.

        Returns:
            The bits above which all are kept; the positions of others that are kept; and how many
            equal ones may be kept after the stride.
        """
        none = np.empty(0, dtype=np.int64)
        if not ties:
            return self.bits, none, 0
        equal = bits == self.bits
        count = int(np.count_nonzero(equal))
        if count <= ties:  # all of them, so that nothing must be listed
            return self.bits - 1, none, ties - count
        return self.bits, np.flatnonzero(equal)[:ties], 0


def find_limit(
    delta: Callable[[Piece], Tensor], pieces: Sequence[Piece], count: int, run: Run
) -> Limit:
    """Find what keeps ``count`` weights exactly; of equal ones the first.

    Args:
        delta: gives the change of a piece, or of any slice.
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
    low, high = _between(delta, pieces, count, run)
    found = _collect(delta, pieces, low, high, run)
    above = sum(n for n, _ in found)
    if not above < count <= above + sum(len(some) for _, some in found):
        low, high = _classes(delta, pieces, count, run)
        found = _collect(delta, pieces, low, high, run)
        above = sum(n for n, _ in found)
    some = np.concatenate([mine for _, mine in found])
    left = count - above
    threshold = int(np.partition(some, len(some) - left)[len(some) - left])
    left -= int((some > threshold).sum())
    ties = {}
    for (start, _), (_, mine) in zip(pieces, found, strict=True):
        ties[start] = min(int((mine == threshold).sum()), left)
        left -= ties[start]
    return Limit(threshold, ties)


def magnitude_bits(delta: Tensor) -> np.ndarray:
    """Return the bits of ``|delta|`` as float32, int32."""
    return delta.float().abs().view(torch.int32).numpy()


def _collect(
    delta: Callable[[Piece], Tensor], pieces: Sequence[Piece], low: int, high: int, run: Run
) -> list[tuple[int, np.ndarray]]:
    """For each piece how many are above ``high``, and those from ``low`` to ``high``."""

    def look(piece: Piece) -> tuple[int, np.ndarray]:
        above, some = 0, []
        for stride in _strides(piece):
            bits = magnitude_bits(delta(stride))
            above += int(np.count_nonzero(bits > high))
            # As unsigned numbers, what lies below ``low`` wraps around to beyond the range.
            bits_above_low = (bits - np.int32(low)).view(np.uint32)
            some.append(bits[bits_above_low <= np.uint32(high - low)])
        return above, np.concatenate(some)

    return list(run(look, pieces))


def _between(
    delta: Callable[[Piece], Tensor], pieces: Sequence[Piece], count: int, run: Run
) -> tuple[int, int]:
    """Magnitudes between which the count-th largest must lie, if the sample is a fair one."""
    numel = pieces[-1][1]
    size = min(_SAMPLE, max(numel // 32, 16 * _STRETCH))
    each = max(1, size // _STRETCH // len(pieces))

    def look(piece: Piece) -> np.ndarray:
        start, stop = piece
        if stop - start <= each * _STRETCH:
            return magnitude_bits(delta(piece))
        starts = np.linspace(start, stop - _STRETCH, each).astype(np.int64)
        return np.concatenate([magnitude_bits(delta((int(a), int(a) + _STRETCH))) for a in starts])

    sample = np.concatenate(list(run(look, pieces)))
    share = count / numel
    # Eight standard deviations: neighbours are alike, so that a stretch says less than it holds.
    spread = 8.0 * (len(sample) * share * (1.0 - share)) ** 0.5 + 2.0
    rank = len(sample) * (1.0 - share)
    low, high = int(rank - spread), int(rank + spread)
    # Sorting the whole sample would take longer than looking through a small tensor.
    sample.partition(sorted({min(max(at, 0), len(sample) - 1) for at in (low, high)}))
    return (
        int(sample[low]) if low >= 0 else 0,
        int(sample[high]) if high < len(sample) else 0x7FFFFFFF,
    )


def _classes(
    delta: Callable[[Piece], Tensor], pieces: Sequence[Piece], count: int, run: Run
) -> tuple[int, int]:
    """The class of leading bits that holds the count-th largest, by counting all of them."""

    def look(piece: Piece) -> np.ndarray:
        counts = np.zeros(1 << 16, dtype=np.int64)
        for stride in _strides(piece):
            counts += np.bincount(magnitude_bits(delta(stride)) >> _LOW, minlength=1 << 16)
        return counts

    counts = np.zeros(1 << 16, dtype=np.int64)
    for mine in run(look, pieces):
        counts += mine
    digit = (1 << 16) - 1 - int(np.searchsorted(np.cumsum(counts[::-1]), count))
    return digit << _LOW, (digit << _LOW) + (1 << _LOW) - 1


def _strides(piece: Piece) -> list[Piece]:
    start, stop = piece
    return [(at, min(at + STRIDE, stop)) for at in range(start, stop, STRIDE)]
