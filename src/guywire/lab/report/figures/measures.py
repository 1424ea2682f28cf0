"""Figures of studies: any measure, on axes of its own, with an interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from guywire.lab.report.figures.svg import (
    Scale,
    element,
    group,
    marker,
    polyline,
    swatch,
    text,
    ticks,
)

__all__ = ["Measure", "Track", "dots", "scatter", "tracks"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 26, 42
_SIZES = ((1080, 440, "wide"), (350, 330, "narrow"))


@dataclass(frozen=True, slots=True)
class Measure:
    """A mean with its interval and the values of its seeds."""

    label: str
    series: int
    mean: float
    low: float | None
    high: float | None
    seeds: Sequence[float] = ()

    def words(self) -> str:
        """The interval as people write it."""
        if self.low is None or self.high is None:
            return f"{self.mean:.3g}"
        digits = _digits(self.mean, self.high - self.low)
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Track:
    """A line over steps with its band; ``low`` and ``high`` may be None at a step."""

    label: str
    series: int
    steps: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]


def dots(title: str, items: Sequence[Measure]) -> Markup:
    """One row a condition: the mean, its interval, and faint marks for the seeds.

    The axis runs from the smallest to the largest value shown, not from zero: a mark's place is
    meant to be compared, not its length.

    Args:
        title: what is measured, with its unit.
        items: one row each, at least one.

    Returns:
        HTML, so that long names wrap; one image for a screen reader.
    """
    ends = [v for m in items for v in (m.mean, m.low, m.high, *m.seeds) if v is not None]
    bottom, top = min(ends), max(ends)
    margin = 0.04 * (top - bottom) or max(abs(top), 1e-9) * 0.05
    bottom, top = bottom - margin, top + margin

    def place(value: float) -> str:
        return f"{100 * (value - bottom) / (top - bottom):.2f}%"

    rows = []
    for m in items:
        marks = [
            element(
                "span",
                class_="fill",
                style=f"left:calc({place(v)} - 2px);width:4px;opacity:.4",
            )
            for v in m.seeds
            if len(m.seeds) > 1
        ]
        if m.low is not None and m.high is not None and m.high > m.low:
            style = f"left:{place(m.low)};width:calc({place(m.high)} - {place(m.low)})"
            marks.append(element("span", class_="whisker", style=style))
        style = f"left:calc({place(m.mean)} - 5px);width:10px;border-radius:5px"
        marks.append(element("span", class_="fill", style=style))
        name = element("span", m.label, class_="name")
        words = element("span", m.words(), class_="words")
        track = element("div", Markup("").join(marks), class_="track")
        rows.append(element("div", name + words + track, class_=f"bar c{m.series}"))
    summary = f"{title}: " + "; ".join(f"{m.label} {m.words()}" for m in items)
    digits = _digits(top, top - bottom)
    ends_line = element("p", f"axis from {bottom:.{digits}f} to {top:.{digits}f}", class_="small")
    return element(
        "div",
        element("p", title, class_="panel-title")
        + element("div", Markup("").join(rows), role="img", aria_label=summary)
        + ends_line,
        class_="panel",
    )


def tracks(
    items: Sequence[Track], *, x_title: str, y_title: str, summary: str, log: bool = False
) -> Markup:
    """Lines over steps with their bands, in one frame, drawn for a wide and for a narrow page.

    Args:
        items: the lines; points that are not finite (or, on a logarithmic axis, not positive) are
            left out.
        x_title: what a step is.
        y_title: what is up, with its unit.
        summary: the figure in words.
        log: a logarithmic axis up.

    Returns:
        Markup, a legend and two drawings of which style shows one.
    """
    legend = element(
        "p",
        Markup(" ").join(
            element(
                "span", swatch(t.series) + t.label, style="margin-right:14px;white-space:nowrap"
            )
            for t in items
        ),
        class_="small",
    )
    return legend + Markup("").join(
        _tracks(items, x_title, y_title, summary, log, *size) for size in _SIZES
    )


def scatter(
    points: Sequence[tuple[Measure, Measure]], *, x_title: str, y_title: str, summary: str
) -> Markup:
    """One measure against another with both intervals, drawn for a wide and for a narrow page.

    Args:
        points: across and up; the label and the series are those of the first.
        x_title: what is across, with its unit.
        y_title: what is up, with its unit.
        summary: the figure in words.

    Returns:
        Markup, a legend and two drawings of which style shows one.
    """
    legend = element(
        "p",
        Markup(" ").join(
            element(
                "span", swatch(x.series) + x.label, style="margin-right:14px;white-space:nowrap"
            )
            for x, _ in points
        ),
        class_="small",
    )
    return legend + Markup("").join(
        _scatter(points, x_title, y_title, summary, *size) for size in _SIZES
    )


def _tracks(
    items: Sequence[Track],
    x_title: str,
    y_title: str,
    summary: str,
    log: bool,
    width: int,
    height: int,
    kind: str,
) -> Markup:
    def fits(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and (value > 0.0 or not log)

    def lift(value: float) -> float:
        return math.log10(value) if log else value

    kept = [(t, [k for k in range(len(t.steps)) if fits(t.mean[k])]) for t in items]
    steps = [t.steps[k] for t, found in kept for k in found] or [0.0, 1.0]
    values = [lift(t.mean[k]) for t, found in kept for k in found] or [0.0, 1.0]
    across, up, parts = _frame(steps, values, x_title, y_title, log, width, height, kind)
    for t, found in kept:
        drawn = []
        band = [k for k in found if fits(t.low[k]) and fits(t.high[k])]
        if len(band) > 1:
            edge = [f"{across(t.steps[k])},{up(lift(t.high[k] or 0.0))}" for k in band]
            edge += [f"{across(t.steps[k])},{up(lift(t.low[k] or 0.0))}" for k in reversed(band)]
            drawn.append(element("polygon", points=" ".join(edge), class_="ceiling-band"))
        drawn.append(
            polyline(
                [across(t.steps[k]) for k in found],
                [up(lift(t.mean[k])) for k in found],
                class_="main",
            )
        )
        if found:  # the mark at the end tells lines apart without colour
            last = found[-1]
            drawn.append(
                marker(t.series, across(t.steps[last]), up(lift(t.mean[last])), 5, title=t.label)
            )
        parts.append(group(drawn, class_=f"c{t.series}"))
    return _svg(parts, summary, width, height, kind)


def _scatter(
    points: Sequence[tuple[Measure, Measure]],
    x_title: str,
    y_title: str,
    summary: str,
    width: int,
    height: int,
    kind: str,
) -> Markup:
    def ends(measures: Sequence[Measure]) -> list[float]:
        return [v for m in measures for v in (m.mean, m.low, m.high) if v is not None]

    xs, ys = ends([x for x, _ in points]), ends([y for _, y in points])
    across, up, parts = _frame(xs, ys, x_title, y_title, False, width, height, kind)
    for x, y in points:
        cx, cy = across(x.mean), up(y.mean)
        arms = []
        if x.low is not None and x.high is not None:
            arms.append(
                element("line", x1=across(x.low), x2=across(x.high), y1=cy, y2=cy, class_="arm")
            )
        if y.low is not None and y.high is not None:
            arms.append(element("line", x1=cx, x2=cx, y1=up(y.low), y2=up(y.high), class_="arm"))
        title = f"{x.label}: {x_title} {x.words()}, {y_title} {y.words()}"
        parts.append(
            group([*arms, marker(x.series, cx, cy, 6.5, title=title)], class_=f"c{x.series}")
        )
    return _svg(parts, summary, width, height, kind)


def _frame(
    xs: Sequence[float],
    ys: Sequence[float],
    x_title: str,
    y_title: str,
    log: bool,
    width: int,
    height: int,
    kind: str,
) -> tuple[Scale, Scale, list[Markup]]:
    x_low, x_high = _padded(xs)
    y_low, y_high = _padded(ys)
    across = Scale(x_low, x_high, _LEFT, width - _RIGHT)
    up = Scale(y_low, y_high, height - _BOTTOM, _TOP)
    parts = []
    for value in ticks(x_low, x_high, about=8 if kind == "wide" else 4):
        x = across(value)
        parts.append(element("line", x1=x, x2=x, y1=_TOP, y2=height - _BOTTOM, class_="grid"))
        parts.append(text(x, height - _BOTTOM + 16, f"{value:g}", class_="tick middle"))
    for value in _powers(y_low, y_high) if log else ticks(y_low, y_high, about=6):
        y = up(value)
        parts.append(element("line", x1=_LEFT, x2=width - _RIGHT, y1=y, y2=y, class_="grid"))
        words = (
            f"{10.0**value:.0e}".replace("e-0", "e-").replace("e+0", "e") if log else f"{value:g}"
        )
        parts.append(text(_LEFT - 6, y + 4, words, class_="tick end"))
    parts.append(text((_LEFT + width - _RIGHT) / 2, height - 6, x_title, class_="axis middle"))
    parts.append(text(4, 14, y_title, class_="axis"))
    return across, up, parts


def _powers(low: float, high: float) -> list[float]:
    whole = list(range(math.ceil(low), math.floor(high) + 1))
    return [float(v) for v in whole[:: max(1, len(whole) // 6)]] or [low, high]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-9)
    return low - margin, high + margin


def _svg(parts: Sequence[Markup], summary: str, width: int, height: int, kind: str) -> Markup:
    return element(
        "svg",
        Markup("").join(parts),
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=summary,
        class_=f"plot {kind}",
    )


def _digits(value: float, span: float) -> int:
    """Digits after the point that show two figures of a span."""
    if span <= 0.0 or not math.isfinite(span):
        span = abs(value) * 0.01 or 1.0
    return min(max(1 - math.floor(math.log10(span)), 0), 6)
