"""Which weights survive a random drop, from a seed and a tensor's name alone.

Every weight of a tensor is dropped with probability ``rate``, independently of all others. Instead of
a number for every weight this draws the *gaps* between survivors (at rates below 1/2: between dropped
ones), which are geometric: at a rate of 0.99 that is one number for a hundred weights.

The flattened tensor is cut into blocks of 2^20 weights. A block's stream of random bits is Philox
under a key hashed from (seed, name), with the block's number in its counter. So any slice of a tensor,
in any order, on any number of threads or shards, has the same survivors, and memory stays bounded.

A 64-bit word becomes a gap by comparing it with a table of integers, ``2^64 (1 - rate^k)``. No
logarithm and no distribution of numpy's is involved: the survivors are the same on every machine and
with every version of numpy, so that a compressed delta needs no index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from guywire.core.errors import UsageError

__all__ = ["BLOCK", "keep_mask", "survivors"]

BLOCK = 1 << 20
"""Weights that share one stream of random bits."""

_LONGEST = 4096  # gaps beyond are put together from several draws: geometric gaps have no memory
_GUIDE = 16  # leading bits of a word that nearly always settle its gap


def survivors(
    name: str,
    numel: int,
    rate: float,
    seed: int = 0,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Return which weights of a tensor survive.

    Args:
        name: of the tensor.
        numel: its number of weights.
        rate: probability that a weight is dropped, in [0, 1].
        seed: of the draw.
        start: first position of the slice that is wanted.
        stop: position after its last one; the end of the tensor if ``None``.

    Returns:
        Positions in the flattened *tensor* (not in the slice), int64, increasing.

    Raises:
        UsageError: the rate is not in [0, 1], or the slice not in the tensor.

    Example:
        >>> kept = survivors("layer.weight", 1000, 0.99, seed=3)
        >>> 0 < len(kept) < 40
        True
        >>> half = survivors("layer.weight", 1000, 0.99, seed=3, start=500)
        >>> bool((half == kept[kept >= 500]).all())
        True
    """
    stop = numel if stop is None else stop
    if not 0.0 <= rate <= 1.0:
        raise UsageError(f"the rate is {rate}: it is the share that is dropped, in [0, 1]")
    if not 0 <= start <= stop <= numel:
        raise UsageError(f"the slice [{start}, {stop}) is not inside a tensor of {numel} weights")
    if rate == 1.0 or start == stop:
        return torch.empty(0, dtype=torch.int64)
    if rate == 0.0:
        return torch.arange(start, stop)
    parts = []
    key = _key(seed, name)
    for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
        origin = block * BLOCK
        low, high = max(start - origin, 0), min(stop - origin, BLOCK)
        found = _kept(key, block, rate, high)
        if low:
            found = found[np.searchsorted(found, low) :]
        parts.append(found + origin if origin else found)
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def keep_mask(
    name: str,
    numel: int,
    rate: float,
    seed: int = 0,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Return :func:`survivors` as a mask.

    Args:
        name: of the tensor.
        numel: its number of weights.
        rate: probability that a weight is dropped, in [0, 1].
        seed: of the draw.
        start: first position of the slice that is wanted.
        stop: position after its last one; the end of the tensor if ``None``.

    Returns:
        True for survivors, ``[stop - start]``.

    Raises:
        UsageError: the rate is not in [0, 1], or the slice not in the tensor.

    Example:
        >>> keep_mask("w", 5, 0.0), int(keep_mask("w", 5, 1.0).sum())
        (tensor([True, True, True, True, True]), 0)
    """
    kept = survivors(name, numel, rate, seed, start=start, stop=stop)
    mask = torch.zeros((numel if stop is None else stop) - start, dtype=torch.bool)
    mask[kept - start] = True
    return mask


def _key(seed: int, name: str) -> int:
    text = f"guywire-mask-1\0{seed}\0{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def _kept(key: int, block: int, rate: float, length: int) -> np.ndarray:
    """Survivors of the first ``length`` weights of a block, counted from its start."""
    if rate >= 0.5:
        return _events(key, block, rate, length)
    mask = np.ones(length, dtype=bool)
    if 1.0 - rate == 1.0:  # less than a double can tell
        return np.flatnonzero(mask)
    mask[_events(key, block, 1.0 - rate, length)] = False
    return np.flatnonzero(mask)


def _events(key: int, block: int, rate: float, length: int) -> np.ndarray:
    """Positions of a Bernoulli process whose gaps have P(gap >= k) = rate^k."""
    # The block's number stands above the 2^64 steps that one block's stream could take.
    stream = np.random.Philox(counter=block << 64, key=key)
    table = _table(rate)
    longest = len(table[0])
    mean = 1.0 - rate**longest  # share of draws that end at an event
    parts: list[np.ndarray] = []
    at = -1
    for words in _words(stream, length * (1.0 - rate) / mean):
        gaps = _gaps(words, table)
        # A draw is either a gap and an event, or the longest gap and no event yet.
        ends = gaps < longest
        whole = bool(ends.all())
        steps = gaps + 1 if whole else gaps + ends
        places = np.cumsum(steps, dtype=np.int64)
        places += at
        at = int(places[-1])
        parts.append(places if whole else places[ends])
        if at >= length - 1:
            break
    places = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return places[: np.searchsorted(places, length)]


def _words(stream: np.random.Philox, expected: float) -> Iterator[np.ndarray]:
    count = int(expected + 4.0 * expected**0.5) + 8
    while True:
        yield stream.random_raw(count)
        count = count // 16 + 8


def _gaps(words: np.ndarray, table: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    limits, guide = table
    gaps = guide[words >> (64 - _GUIDE)]
    open_ = np.flatnonzero(gaps < 0)
    if len(open_):
        gaps[open_] = np.searchsorted(limits, words[open_], side="right")
    return gaps


@lru_cache(maxsize=64)
def _table(rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Limits ``2^64 (1 - rate^k)`` for k = 1, 2, ..., and each leading 16 bits' gap, -1 if open."""
    p = Fraction(rate)
    one = 1 << 64
    # 96 bits are carried: the limits are right to the last of their 64 bits.
    left, factor, limits = 1 << 96, int(p * (1 << 96)), []
    for _ in range(_LONGEST):
        left = left * factor >> 96
        limit = one - (left >> 32)
        if limit >= one or (limits and limit == limits[-1]):
            break
        limits.append(limit)
    array = np.array(limits, dtype=np.uint64)
    first = np.arange(1 << _GUIDE, dtype=np.uint64) << np.uint64(64 - _GUIDE)
    last = first + np.uint64((1 << (64 - _GUIDE)) - 1)
    low = np.searchsorted(array, first, side="right")
    high = np.searchsorted(array, last, side="right")
    return array, np.where(low == high, low, -1).astype(np.int32)
