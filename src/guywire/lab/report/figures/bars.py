"""Horizontal bars with intervals: plain HTML, so that long names wrap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from guywire.lab.report.figures.svg import element
from guywire.lab.report.stats import Interval

__all__ = ["Bar", "bars"]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: a name, the index of its series, its value, and the value in words."""

    label: str
    series: int
    value: Interval | None
    words: str


def bars(title: str, items: Sequence[Bar]) -> Markup:
    """A panel of bars from zero.

    Args:
        title: what is measured, with its unit.
        items: one bar each; None as a value writes only the words.

    Returns:
        Markup, one image for a screen reader (a table of the numbers belongs beside it).
    """
    ends = [b.value.high if b.value.high is not None else b.value.mean for b in items if b.value]
    top = max([*ends, 1e-12])

    def share(value: float) -> str:
        return f"{100 * min(max(value / top, 0.0), 1.0):.2f}%"

    rows = []
    for bar in items:
        track = Markup("")
        if bar.value is not None:
            track = element("span", class_="fill", style=f"width:{share(bar.value.mean)}")
            if _wide(bar.value, top):
                low = max(bar.value.low or 0.0, 0.0)
                style = (
                    f"left:{share(low)};width:calc({share(bar.value.high or 0.0)} - {share(low)})"
                )
                track += element("span", class_="whisker", style=style)
        name = element("span", bar.label, class_="name")
        words = element("span", bar.words, class_="words")
        rows.append(
            element(
                "div",
                name + words + element("div", track or " ", class_="track"),
                class_=f"bar c{bar.series}",
            )
        )
    summary = f"{title}: " + "; ".join(f"{b.label} {b.words}" for b in items)
    return element(
        "div",
        element("p", title, class_="panel-title")
        + element("div", Markup("").join(rows), role="img", aria_label=summary),
        class_="panel",
    )


def _wide(value: Interval, top: float) -> bool:
    """Whether the interval is there and wide enough to be drawn."""
    if value.low is None or value.high is None:
        return False
    return value.high - value.low > 0.004 * top
