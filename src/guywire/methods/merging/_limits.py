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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Piece = tuple[int, int]
Run = Callable[[Callable[[Piece], Any], Sequence[Piece]], Iterable[Any]]
Deltas = Callable[[Sequence[Piece]], Sequence[Tensor]]

STRIDE = 1 << 18
"""Weights that are looked at together. With fewer, threads would mostly hand over Python's lock."""

_LOW = 15
_SAMPLE = 1 << 17  # of a tensor, in stretches
_STRETCH = 1024


class Found(NamedTuple):
    """How a piece's magnitudes lie beside a range from ``low`` to ``high``.

    Attributes:
        above: how many are above ``high``.
        lowest: how many are ``low``, which may be 0 for nearly all: they need no list.
        inside: the others of the range, as bits.
    """

    above: int
    lowest: int
    inside: np.ndarray


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
    """Return :func:`find_limits` of one model.

    Args:
        delta: gives the change of a piece, or of any slice.
        pieces: (start, stop), in order, of the whole tensor.
        count: how many to keep.
        run: maps a function over pieces, in order, perhaps on several threads.

    Returns:
        The limit.
    """
    return find_limits(
        lambda slices: [torch.cat([delta(piece) for piece in slices])], 1, pieces, count, run
    )[0]


def find_limits(
    deltas: Deltas,
    models: int,
    pieces: Sequence[Piece],
    count: int,
    run: Run,
    step: int = STRIDE,
) -> list[Limit]:
    """Find what keeps ``count`` weights of each model exactly; of equal ones the first.

    Args:
        deltas: gives each model's change in slices of the tensor, one behind the other.
        models: how many.
        pieces: (start, stop), in order, of the whole tensor.
        count: how many to keep.
        run: maps a function over pieces, in order, perhaps on several threads.
        step: weights of a stride.

    Returns:
        The limits.
    """
    numel = pieces[-1][1]
    if count >= numel:
        return [Limit(-1, {})] * models
    if count == 0:
        return [Limit(0x7FFFFFFF, {})] * models
    ranges = _between(deltas, pieces, count, run)
    found = _collect(deltas, pieces, ranges, run, step)
    limits = [
        _limit(pieces, mine, low, count) for mine, (low, _) in zip(found, ranges, strict=True)
    ]
    missed = [i for i, limit in enumerate(limits) if limit is None]
    if missed:

        def some(slices: Sequence[Piece]) -> list[Tensor]:
            every = deltas(slices)
            return [every[i] for i in missed]

        ranges = _classes(some, len(missed), pieces, count, run, step)
        found = _collect(some, pieces, ranges, run, step)
        for i, mine, (low, _) in zip(missed, found, ranges, strict=True):
            limits[i] = _limit(pieces, mine, low, count)
    return [limit for limit in limits if limit is not None]


def _limit(pieces: Sequence[Piece], found: Sequence[Found], low: int, count: int) -> Limit | None:
    """The limit, if it is in the range in which magnitudes were collected."""
    left = count - sum(piece.above for piece in found)
    inside = np.concatenate([piece.inside for piece in found])
    if not 0 < left <= len(inside) + sum(piece.lowest for piece in found):
        return None
    if left > len(inside):
        threshold = low
        left -= len(inside)
        equal = [piece.lowest for piece in found]
    else:
        at = len(inside) - left
        inside.partition(at)
        threshold = int(inside[at])
        left -= int(np.count_nonzero(inside > threshold))
        equal = [int(np.count_nonzero(piece.inside == threshold)) for piece in found]
    ties = {}
    for (start, _), mine in zip(pieces, equal, strict=True):
        ties[start] = min(mine, left)
        left -= ties[start]
    return Limit(threshold, ties)


def magnitude_bits(delta: Tensor) -> np.ndarray:
    """Return the bits of ``|delta|`` as float32, int32."""
    return delta.float().abs().view(torch.int32).numpy()


def _collect(
    deltas: Deltas, pieces: Sequence[Piece], ranges: Sequence[tuple[int, int]], run: Run, step: int
) -> list[list[Found]]:
    """Look where each model's magnitudes lie beside a range of its own, for each piece."""

    def look(piece: Piece) -> list[Found]:
        above, lowest = [0] * len(ranges), [0] * len(ranges)
        inside: list[list[np.ndarray]] = [[] for _ in ranges]
        for stride in _strides(piece, step):
            for i, (delta, (low, high)) in enumerate(zip(deltas([stride]), ranges, strict=True)):
                bits = magnitude_bits(delta)
                bits -= np.int32(low)
                above[i] += int(np.count_nonzero(bits > np.int32(high - low)))
                # As unsigned numbers, what lies below wraps around to beyond the range.
                within = bits.view(np.uint32) <= np.uint32(high - low)
                count = int(np.count_nonzero(within))
                if count > len(bits) // 8:  # nearly all may share the lowest: listing takes long
                    shared = bits == 0
                    within &= ~shared
                    lowest[i] += int(np.count_nonzero(shared))
                if count:
                    some = bits[within]
                    some += np.int32(low)
                    inside[i].append(some)
        empty = np.empty(0, dtype=np.int32)
        return [
            Found(n, k, np.concatenate([empty, *some]))
            for n, k, some in zip(above, lowest, inside, strict=True)
        ]

    return [list(mine) for mine in zip(*run(look, pieces), strict=True)]


def _between(
    deltas: Deltas, pieces: Sequence[Piece], count: int, run: Run
) -> list[tuple[int, int]]:
    """Magnitudes between which the count-th largest must lie, if the sample is a fair one."""
    numel = pieces[-1][1]
    size = min(_SAMPLE, max(numel // 32, 16 * _STRETCH))
    each = max(1, size // _STRETCH // len(pieces))

    def look(piece: Piece) -> list[np.ndarray]:
        start, stop = piece
        if stop - start <= each * _STRETCH:
            stretches = [piece]
        else:
            starts = np.linspace(start, stop - _STRETCH, each).astype(np.int64).tolist()
            stretches = [(at, at + _STRETCH) for at in starts]
        # All at once: a call for each stretch would be most of the calls of a merge.
        return [magnitude_bits(delta) for delta in deltas(stretches)]

    ranges = []
    share = count / numel
    for parts in zip(*run(look, pieces), strict=True):
        sample = np.concatenate(parts)
        # Eight standard deviations: neighbours are alike, so a stretch says less than it holds.
        spread = 8.0 * (len(sample) * share * (1.0 - share)) ** 0.5 + 2.0
        rank = len(sample) * (1.0 - share)
        low, high = int(rank - spread), int(rank + spread)
        # Sorting the whole sample would take longer than looking through a small tensor.
        sample.partition(sorted({min(max(at, 0), len(sample) - 1) for at in (low, high)}))
        ranges.append(
            (
                int(sample[low]) if low >= 0 else 0,
                int(sample[high]) if high < len(sample) else 0x7FFFFFFF,
            )
        )
    return ranges


def _classes(
    deltas: Deltas, models: int, pieces: Sequence[Piece], count: int, run: Run, step: int
) -> list[tuple[int, int]]:
    """The class of leading bits that holds the count-th largest, by counting all of them."""

    def look(piece: Piece) -> np.ndarray:
        counts = np.zeros((models, 1 << 16), dtype=np.int64)
        for stride in _strides(piece, step):
            for mine, delta in zip(counts, deltas([stride]), strict=True):
                mine += np.bincount(magnitude_bits(delta) >> _LOW, minlength=1 << 16)
        return counts

    counts = np.zeros((models, 1 << 16), dtype=np.int64)
    for mine in run(look, pieces):
        counts += mine
    digits = [(1 << 16) - 1 - int(np.searchsorted(np.cumsum(c[::-1]), count)) for c in counts]
    return [(digit << _LOW, (digit << _LOW) + (1 << _LOW) - 1) for digit in digits]


def _strides(piece: Piece, step: int) -> list[Piece]:
    start, stop = piece
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]
