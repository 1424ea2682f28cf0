"""The growth figures as SVG: lines on logarithmic axes, ranges as bars, one file a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from guywire.lab.report.figures.svg import element, ticks
from guywire.lab.report.palette import LIGHT

__all__ = ["figure"]

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 52, 46
DASHES = ("", "6 3", "2 3", "8 3 2 3")


def _short(value: float) -> str:
    if value >= 1e4:
        power = math.floor(math.log10(value) + 1e-9)
        lead = value / 10**power
        return f"10^{power}" if abs(lead - 1) < 0.01 else f"{lead:.2g}e{power}"
    return f"{value:g}"


def _marks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        return ticks(low, high, 5)
    found = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    inside = [v for v in found if low * 0.999 <= v <= high * 1.001]
    whole = [v for v in inside if abs(math.log10(v) - round(math.log10(v))) < 1e-9]
    return whole if len(whole) >= 3 else inside


def _axis(low: float, high: float, start: float, end: float, log: bool) -> Any:
    a, b = (math.log10(low), math.log10(high)) if log else (low, high)

    def place(value: float) -> float:
        v = math.log10(value) if log else value
        return round(start + (v - a) / ((b - a) or 1.0) * (end - start), 2)

    return place


def figure(series: Mapping[str, Any]) -> str:
    """Draw one figure; a line without points is named in the legend as not measured.

    Raises:
        ValueError: there are no points at all.
    """
    points = [p for line in series["lines"].values() for p in line]
    if not points:
        raise ValueError(f"no points for {series['title']!r}")
    logx, logy = "x" in series["log"], "y" in series["log"]
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[2] for p in points), max(p[3] for p in points)
    y0, y1 = (low / 1.25, high * 1.25) if logy else (0.0, high * 1.1)
    atx = _axis(x0, x1, LEFT + 10, WIDTH - RIGHT - 10, logx)
    aty = _axis(y0, y1, HEIGHT - BOTTOM, TOP, logy)
    parts = [
        element("title", f"{series['title']}: {series['y']} against {series['x']}"),
        element("rect", x=0, y=0, width=WIDTH, height=HEIGHT, fill="#ffffff"),
        element("text", series["title"], x=LEFT, y=18, font_size=14, font_weight="bold"),
    ]
    for value in _marks(y0, y1, logy):
        y = aty(value)
        parts += [
            element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, stroke="#d9dde1"),
            element("text", _short(value), x=LEFT - 6, y=y + 4, text_anchor="end"),
        ]
    at = sorted({p[0] for p in points})
    shown = _marks(x0, x1, logx) if len(at) > 8 or x1 >= 1e4 else at
    for value in shown:
        x = atx(value)
        bottom = HEIGHT - BOTTOM
        parts += [
            element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, stroke="#57606a"),
            element("text", _short(value), x=x, y=bottom + 17, text_anchor="middle"),
        ]
    parts += [
        element("text", series["x"], x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"),
        element(
            "text", series["y"], text_anchor="middle",
            transform=f"translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)",
        ),
    ]  # fmt: skip
    along = LEFT
    for number, (name, line) in enumerate(series["lines"].items()):
        colour, dash = LIGHT[number % len(LIGHT)], DASHES[number % len(DASHES)] or None
        label = name if line else f"{name}: not measured"
        parts += [
            element(
                "line", x1=along, x2=along + 22, y1=36, y2=36,
                stroke=colour, stroke_width=2, stroke_dasharray=dash,
            ),
            element("text", label, x=along + 27, y=40),
        ]  # fmt: skip
        along += 42 + 6.6 * len(label)
        if not line:
            continue
        path = "M" + " L".join(f"{atx(p[0])} {aty(p[1])}" for p in line)
        parts.append(
            element(
                "path", d=path, fill="none", stroke=colour, stroke_width=2, stroke_dasharray=dash
            )
        )
        for x, median, least, most in line:
            told = element("title", f"{name}, {x:g} {series['x']}: {median:.3g} ({least:.3g} to {most:.3g})")  # fmt: skip
            parts += [
                element(
                    "line", x1=atx(x), x2=atx(x), y1=aty(least), y2=aty(most),
                    stroke=colour, stroke_width=1.5,
                ),
                element("circle", told, cx=atx(x), cy=aty(median), r=3.5, fill=colour),
            ]  # fmt: skip
    return str(
        element(
            "svg", Markup("\n").join(parts), xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, height=HEIGHT, role="img",
            font_family="system-ui, sans-serif", font_size=12, fill="#1b1f24",
        )
    ) + "\n"  # fmt: skip
