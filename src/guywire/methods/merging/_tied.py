"""Tensors that are one tensor saved under two names."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from guywire.methods.merging.files import Checkpoint, Entry
from guywire.methods.merging.matching import Item

_LOOK = 256  # elements whose bytes settle nearly all pairs
_STEP = 1 << 20


def tied(base: Checkpoint, files: dict[str, list[Item]]) -> list[tuple[str, Item]]:
    """Give tensors that are one in base and models the same mask, so that they stay one."""
    items = [(file, item) for file, inside in files.items() for item in inside]
    groups: dict[bytes, list[int]] = {}
    for i, (_, item) in enumerate(items):
        if item.base is not None and item.parts and len(item.shape) == 2 and item.numel:
            groups.setdefault(_look(base, item), []).append(i)
    out = list(items)
    for group in groups.values():
        for position, i in enumerate(group):
            for j in group[:position]:
                first, second = out[j][1], out[i][1]
                if first.mask == _own(first) and _same(base, first, second):
                    out[i] = (out[i][0], replace(second, mask=first.mask, pruned=first.pruned))
                    break
    return out


def _own(item: Item) -> str:
    return item.base.name if item.base is not None else item.name


def _entries(base: Checkpoint, item: Item) -> list[tuple[Checkpoint, Entry]]:
    assert item.base is not None
    found = [(base, item.base)]
    for part in item.parts:
        if part.entry is not None and part.owner is not None:
            found.append((part.owner, part.entry))
    return found


def _look(base: Checkpoint, item: Item) -> bytes:
    digest = hashlib.blake2b(repr((item.dtype, item.shape)).encode(), digest_size=16)
    for part in item.parts:
        digest.update(repr((part.model, part.factors is None or id(part.factors))).encode())
    for owner, entry in _entries(base, item):
        digest.update(repr((entry.dtype, entry.shape)).encode())
        start = owner.read(entry.name, 0, min(entry.numel, _LOOK))
        digest.update(start.view(dtype=torch.uint8).numpy().data)
    return digest.digest()


def _same(base: Checkpoint, a: Item, b: Item) -> bool:
    pairs = zip(_entries(base, a), _entries(base, b), strict=True)
    return all(
        one.read(x.name, at, min(at + _STEP, x.numel)).equal(
            other.read(y.name, at, min(at + _STEP, x.numel))
        )
        for (one, x), (other, y) in pairs
        for at in range(0, x.numel, _STEP)
    )
