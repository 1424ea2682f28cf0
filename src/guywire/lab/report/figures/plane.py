"""Two measures against each other, with an interval in each direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from guywire.lab.report.figures.svg import Scale, element, group, marker, text, ticks
from guywire.lab.report.stats import Interval

__all__ = ["Point", "plane"]

Box = tuple[float, float, float, float]
Place = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """One point: its name, series, both intervals, and the pairs of its seeds."""

    label: str
    series: int
    x: Interval
    y: Interval
    seeds: Sequence[tuple[float, float]] = ()


def plane(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    summary: str,
    better: str = "",
    ceiling: tuple[str, int, Interval] | None = None,
) -> Markup:
    """A scatter plot, drawn twice: for a wide and for a narrow page.

    Args:
        points: what to draw.
        x_title: what is across, with its unit.
        y_title: what is up, with its unit.
        summary: the figure in words, for those who cannot see it.
        better: words for the better corner (up and to the left), or nothing.
        ceiling: name, series and height of a horizontal line with its band.

    Returns:
        Markup; style shows one of the two drawings.
    """
    drawings = [
        _draw(points, x_title, y_title, summary, better, ceiling, width, height, kind)
        for width, height, kind in ((1080, 480, "wide"), (350, 380, "narrow"))
    ]
    return Markup("").join(drawings)


def _range(
    intervals: Sequence[Interval], seeds: Sequence[float], pad: float
) -> tuple[float, float]:
    values = [v for i in intervals for v in (i.mean, i.low, i.high) if v is not None]
    values += list(seeds)
    low, high = min(values), max(values)
    # A wide interval of few seeds must not squeeze the means into a corner.
    means = [i.mean for i in intervals] + list(seeds)
    reach = max(max(means) - min(means), 1e-9)
    low, high = max(low, min(means) - reach), min(high, max(means) + reach)
    margin = max((high - low) * pad, 1.0)
    return low - margin, high + margin


def _draw(
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    summary: str,
    better: str,
    ceiling: tuple[str, int, Interval] | None,
    width: int,
    height: int,
    kind: str,
) -> Markup:
    left, right, top, bottom = 44, 14, 26, 42
    tops = [p.y for p in points] + ([ceiling[2]] if ceiling else [])
    x_range = _range([p.x for p in points], [s[0] for p in points for s in p.seeds], 0.06)
    y_range = _range(tops, [s[1] for p in points for s in p.seeds], 0.06)
    across = Scale(*x_range, left, width - right)
    up = Scale(*y_range, height - bottom, top)
    parts: list[Markup] = []
    for value in ticks(*x_range, about=8 if kind == "wide" else 4):
        x = across(value)
        parts.append(element("line", x1=x, x2=x, y1=top, y2=height - bottom, class_="grid"))
        parts.append(text(x, height - bottom + 16, f"{value:g}", class_="tick middle"))
    for value in ticks(*y_range, about=6):
        y = up(value)
        parts.append(element("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"))
        parts.append(text(left - 6, y + 4, f"{value:g}", class_="tick end"))
    parts.append(text((left + width - right) / 2, height - 6, x_title, class_="axis middle"))
    parts.append(text(4, 14, y_title, class_="axis"))
    taken: list[Box] = []
    if ceiling is not None:
        name, series, level = ceiling
        y = up(level.mean)
        band = []
        if level.low is not None and level.high is not None:
            y1, y0 = up(level.high), up(level.low)
            band.append(
                element(
                    "rect",
                    x=left,
                    y=y1,
                    width=width - left - right,
                    height=round(y0 - y1, 2),
                    class_="ceiling-band",
                )
            )
        band.append(element("line", x1=left, x2=width - right, y1=y, y2=y, class_="ceiling"))
        below = y < top + 16
        band.append(text(width - right - 4, y + 15 if below else y - 6, name, class_="label end"))
        parts.append(group(band, class_=f"c{series}"))
        edge = width - right - 4
        taken.append((edge - _length(name), y - 18, edge, y + 18))
    if better:
        # An arrow and a word in the corner that one wants to be in.
        parts.append(text(left + 8, height - bottom - 8, better, class_="tick"))
        taken.append((left, height - bottom - 22, left + 8 + _length(better), height - bottom))
    marks = [(across(p.x.mean), up(p.y.mean)) for p in points]
    for p, (x, y) in zip(points, marks, strict=True):
        taken.append((x - 7, y - 7, x + 7, y + 7))
        if p.x.low is not None and p.x.high is not None:
            taken.append((across(p.x.low), y - 2, across(p.x.high), y + 2))
        if p.y.low is not None and p.y.high is not None:
            taken.append((x - 2, up(p.y.high), x + 2, up(p.y.low)))
    for p in points:
        seeds = [
            element("circle", cx=across(a), cy=up(b), r=2.6, class_="dot")
            for a, b in p.seeds
            if len(p.seeds) > 1
        ]
        parts.append(group(seeds + _cross(p, across, up), class_=f"c{p.series}"))
    for p in points:
        x, y = across(p.x.mean), up(p.y.mean)
        parts.append(
            marker(
                p.series,
                x,
                y,
                6.5,
                title=f"{p.label}: {x_title} {p.x.mean:.1f}, {y_title} {p.y.mean:.1f}",
            )
        )
        parts.append(_label(p, (x, y), marks, taken, (left, top, width - right, height - bottom)))
    return element(
        "svg",
        Markup("").join(parts),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=summary,
        class_=f"plot plane {kind}",
    )


def _cross(point: Point, across: Scale, up: Scale) -> list[Markup]:
    x, y = across(point.x.mean), up(point.y.mean)
    arms = []
    if point.x.low is not None and point.x.high is not None:
        arms.append(
            element(
                "line", x1=across(point.x.low), x2=across(point.x.high), y1=y, y2=y, class_="arm"
            )
        )
    if point.y.low is not None and point.y.high is not None:
        arms.append(
            element("line", x1=x, x2=x, y1=up(point.y.low), y2=up(point.y.high), class_="arm")
        )
    return arms


def _length(words: str) -> float:
    """Roughly how wide 13 px type is."""
    return 7.2 * len(words) + 4


def _label(point: Point, at: Place, marks: Sequence[Place], taken: list[Box], frame: Box) -> Markup:
    """The name beside its mark, where it covers least and is nearest to no other mark."""
    x, y = at
    shown = point.label if len(point.label) <= 28 else point.label[:27] + "…"
    w, h = _length(shown), 15.0
    best: tuple[float, Box] | None = None
    for radius in (10.0, 20.0, 34.0):
        slant = 0.8 * radius
        corners = (
            (x + radius, y - h / 2), (x - radius - w, y - h / 2),
            (x - w / 2, y - radius - h), (x - w / 2, y + radius),
            (x + slant, y - slant - h), (x + slant, y + slant),
            (x - slant - w, y - slant - h), (x - slant - w, y + slant),
        )  # fmt: skip
        for a, b in corners:
            box = (a, b, a + w, b + h)
            cost = radius + sum(_overlap(box, other) for other in taken)
            outside = (frame[0] - a, a + w - frame[2], frame[1] - b, b + h - frame[3])
            cost += 40 * sum(max(v, 0.0) for v in outside)
            mine = _distance(box, at)
            cost += 60 * sum(_distance(box, m) < mine + 6 for m in marks if m != at)
            if best is None or cost < best[0]:
                best = (cost, box)
    assert best is not None
    box = best[1]
    taken.append(box)
    lead = Markup("")
    if _distance(box, at) > 16:
        near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        lead = element(
            "line", x1=x, y1=y, x2=round(near[0], 2), y2=round(near[1], 2), class_="lead"
        )
    words = text(box[0] + 2, box[1] + 12, shown, class_="label")
    return group([lead, words], class_=f"c{point.series}")


def _distance(box: Box, place: Place) -> float:
    x, y = place
    return math.hypot(max(box[0] - x, x - box[2], 0.0), max(box[1] - y, y - box[3], 0.0))


def _overlap(a: Box, b: Box) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    return w * h if w > 0 and h > 0 else 0.0
