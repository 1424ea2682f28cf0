"""Ways to damage bytes and JSON-like values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rng = np.random.Generator

NAMES = (
    "../../escape", "..", ".", "/", "", "../witness", "a/../../b", "x/y", "\x00", "a\x00b",
    "n" * 3000, "\ud800", "new\nline", "~nobody/x", "~", "a.weight", "C:\\x", "-", "*", "[", "{",
    "%s", "{0}", "[red]", "\u202e", "NUL", "con\\..\\x",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64,
    10**30, 10**400, -(10**30), 0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, -1e308, float("nan"),
    float("inf"), -float("inf"), "", "x", "0", "nan", "F32", [], {}, [[]], [0], [1, 2, 3], [-1, -1],
    [None], {"": {}}, {"a": [{"b": None}]}, ["a", 1], [1 << 62] * 2, [1 << 40, 1 << 40],
    [1] * 300, [(1 << 61) + 1] * 3000, {"bytes": None}, "../../escape", "/escape",
)  # fmt: skip


def pick(rng: Rng, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def damaged(rng: Rng, data: bytes) -> bytes:
    """Flip, cut, repeat, insert, swap: one to three times."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        size = len(out)
        if not size:
            return bytes(rng.integers(0, 256, int(rng.integers(0, 40)), dtype=np.uint8))
        at = int(rng.integers(size))
        # Headers decide more than bodies do.
        at = at % 64 if rng.random() < 0.4 else at
        at = min(at, size - 1)
        length = int(rng.integers(1, 17))
        match int(rng.integers(10)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at] = int(rng.integers(256))
            case 2:
                del out[at:]
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = bytes(rng.integers(0, 256, length, dtype=np.uint8))
            case 5:
                out[at : at + length] = out[at : at + length] * int(rng.integers(2, 5))
            case 6:
                out[at : at + length] = pick(rng, (b"\xff", b"\x00", b"\x80", b"\x7f")) * length
            case 7:
                other = int(rng.integers(size))
                piece = bytes(out[other : other + length])
                out[at : at + len(piece)] = piece
            case 8:
                out += bytes(rng.integers(0, 256, length, dtype=np.uint8))
            case _:
                word = pick(rng, (1 << 31, (1 << 31) - 1, 0xFFFFFFFF, 1 << 30, 0, 65536))
                order = pick(rng, ("little", "big"))
                out[at : at + 4] = word.to_bytes(4, order)
    return bytes(out)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values stand in a tree of dicts and lists."""
    found = [path] if path else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += places(value, (*path, key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree[:20]):
            found += places(value, (*path, i))
    return found


def twisted(rng: Rng, tree: Any, more: Sequence[Any] = ()) -> Any:
    """Replace, drop, rename or double one to three values of a JSON-like tree."""
    tree = json.loads(json.dumps(tree))
    for _ in range(int(rng.integers(1, 4))):
        spots = places(tree)
        if not spots:
            return pick(rng, VALUES)
        *above, last = pick(rng, spots)
        home = tree
        for key in above:
            home = home[key]
        match int(rng.integers(6)):
            case 0 | 1 | 2:
                home[last] = pick(rng, (*VALUES, *NAMES, *more))
            case 3:
                del home[last]
            case 4 if isinstance(home, dict):
                home[pick(rng, NAMES)] = home.pop(last)
            case _:
                if isinstance(home[last], bool | type(None)) or not isinstance(home[last], int):
                    home[last] = [home[last]] if rng.random() < 0.5 else str(home[last])
                else:
                    home[last] += int(pick(rng, (1, -1, 8, 1 << 33)))
    return tree


def as_json(rng: Rng, tree: Any) -> bytes:
    """JSON, now and then no JSON: damaged, nested deeply, in another encoding."""
    text = json.dumps(tree)
    chance = rng.random()
    if chance < 0.1:
        return damaged(rng, text.encode())
    if chance < 0.14:
        return pick(rng, (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"[" * 990 + b"]" * 990))
    if chance < 0.17:
        return text.encode(pick(rng, ("utf-16", "utf-32", "utf-8-sig")))
    if chance < 0.19:
        return text.replace("0", "9" * 5000, 1).encode()
    return text.encode()


Maker = Callable[..., Any]
