"""Small pieces of SVG: elements with escaped text, nice ticks, marker shapes, thinned lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from guywire.lab.report.palette import SHAPES

__all__ = ["Scale", "element", "group", "marker", "polyline", "swatch", "text", "thin", "ticks"]

_EMPTY = frozenset({"circle", "input", "line", "path", "polygon", "rect"})


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from ``[low, high]`` in the data to ``[start, end]`` in the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value lies; values outside the range are moved to its edge."""
        span = (self.high - self.low) or 1.0
        share = min(max((value - self.low) / span, 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 2)


def element(name: str, body: object = "", /, **attributes: object) -> Markup:
    """One element; underscores in attribute names become dashes, values are escaped.

    >>> element("text", "a < b", x=1, class_="tick")
    Markup('<text x="1" class="tick">a &lt; b</text>')
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = escape(body)
    if not inner and name in _EMPTY:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{inner}</{name}>")


def group(parts: Iterable[Markup], **attributes: object) -> Markup:
    """A ``<g>`` around parts."""
    return element("g", Markup("").join(parts), **attributes)


def text(x: float, y: float, words: str, **attributes: object) -> Markup:
    """A piece of text at a place."""
    return element("text", words, x=round(x, 2), y=round(y, 2), **attributes)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside a range, roughly as many as asked.

    >>> ticks(0, 1, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / max(about, 1)
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 10) + 0.0 for k in range(first, last + 1)]


def marker(index: int, x: float, y: float, size: float = 6, title: str = "") -> Markup:
    """The mark of series ``index``: its own shape in its own colour."""
    shape = SHAPES[index % len(SHAPES)]
    label = element("title", title) if title else Markup("")
    if shape in {"circle", "ring"}:
        mark = element("circle", label, cx=x, cy=y, r=round(size * 0.95, 2))
    else:
        points = " ".join(f"{x + size * a:.2f},{y + size * b:.2f}" for a, b in _outline(shape))
        mark = element("polygon", label, points=points)
    kind = "mark hollow" if shape == "ring" else "mark"
    return group([mark], class_=f"{kind} c{index}")


def swatch(index: int) -> Markup:
    """The mark of a series, to stand before its name in running text."""
    return element(
        "svg", marker(index, 8, 8, 5.5), viewBox="0 0 16 16", class_="swatch", aria_hidden="true"
    )


def _outline(shape: str) -> list[tuple[float, float]]:
    def ring(n: int, turn: float, radii: Sequence[float] = (1.0,)) -> list[tuple[float, float]]:
        angles = [turn + 2 * math.pi * k / n for k in range(n)]
        return [
            (radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a))
            for k, a in enumerate(angles)
        ]

    up = -math.pi / 2
    cross = [(0.35, 1), (0.35, 0.35), (1, 0.35), (1, -0.35), (0.35, -0.35), (0.35, -1)]
    cross = cross + [(-x, -y) for x, y in cross]
    outlines = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "diamond": ring(4, up, (1.15,)),
        "up": ring(3, up, (1.2,)),
        "down": ring(3, -up, (1.2,)),
        "hexagon": ring(6, 0.0, (1.05,)),
        "pentagon": ring(5, up, (1.1,)),
        "plus": cross,
        "cross": [((x - y) * 0.707, (x + y) * 0.707) for x, y in cross],
        "star": ring(10, up, (1.3, 0.55)),
    }
    return outlines[shape]


def thin(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep a line's first, last, lowest and highest point of each of ``most`` stretches.

    A drop of one step survives, however long the line is: that is what the stability gap needs.

    Args:
        x: ``[N]`` ascending.
        y: ``[N]``.
        most: number of stretches; the result has at most ``4 * most`` points.

    Returns:
        The kept points.
    """
    if len(x) <= 4 * most:
        return x, y
    span = (x[-1] - x[0]) or 1
    stretch = np.minimum((x - x[0]) * most // span, most - 1).astype(int)
    keep: set[int] = set()
    edges = [*np.flatnonzero(np.diff(stretch, prepend=-1)).tolist(), len(x)]
    for start, end in itertools.pairwise(edges):
        part = y[start:end]
        keep |= {start, end - 1, start + int(part.argmin()), start + int(part.argmax())}
    kept = np.array(sorted(keep))
    return x[kept], y[kept]


def polyline(x: Sequence[float], y: Sequence[float], **attributes: object) -> Markup:
    """A line through points, written short: one decimal, relative moves."""
    px = [round(v * 10) for v in x]
    py = [round(v * 10) for v in y]
    if not px:
        return Markup("")
    parts = [f"M{px[0] / 10:g} {py[0] / 10:g}l"]
    moves = [
        f"{(px[i] - px[i - 1]) / 10:g} {(py[i] - py[i - 1]) / 10:g}" for i in range(1, len(px))
    ] or ["0 0"]
    parts.append(" ".join(moves))
    return element("path", d="".join(parts).replace(" -", "-"), **attributes)
