"""Small multiples of lines over training steps, with the borders between tasks marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from guywire.lab.report.figures.svg import Scale, element, group, polyline, swatch, text, thin

__all__ = ["Line", "Panel", "panel_head", "panels"]

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 30, 6, 8, 24


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a panel.

    Attributes:
        key: index of the choice that shows it.
        x: ``[N]`` steps, ascending.
        y: ``[N]`` shares between 0 and 1.
        main: drawn bold (a mean) or faint (one seed).
    """

    key: int
    x: np.ndarray
    y: np.ndarray
    main: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        series: index of its series.
        lines: what is drawn.
        borders: the steps after which tasks begin, and the last step: one more than tasks. They are
            the panel's own, for methods may take a different number of steps.
        note: a few words beside the title.
    """

    title: str
    series: int
    lines: Sequence[Line]
    borders: Sequence[float]
    note: str = ""


def panel_head(title: str, series: int, note: str = "") -> Markup:
    """Heading of a small multiple: the mark of its series, its title, a few words."""
    words = swatch(series) + element("span", title, class_="name")
    if note:
        words += element("span", note, class_="note")
    return element("p", words, class_="panel-title")


def panels(
    items: Sequence[Panel],
    choices: Sequence[str],
    *,
    name: str,
    question: str,
    budget: int = 60_000,
) -> Markup:
    """Small multiples, one choice of lines at a time; every task gets the same width.

    Args:
        items: the panels.
        choices: what can be chosen; ``Line.key`` counts them. The first is shown at first.
        name: a name for the radio buttons, unique in the page.
        question: what the choice is about.
        budget: how many points all lines together may have; beyond it they are thinned so that
            every drop stays.

    Returns:
        Markup; the choice works without a script.
    """
    tasks = max((len(p.borders) - 1 for p in items), default=1)
    count = sum(len(p.lines) for p in items) or 1
    most = min(max(budget // (4 * count), 24), _WIDTH)
    buttons = []
    for k, words in enumerate(choices):
        attributes = {"checked": "checked"} if k == 0 else {}
        button = element(
            "input", type="radio", name=name, id=f"{name}-{k}", value=str(k), **attributes
        )
        buttons.append(button + element("label", words, for_=f"{name}-{k}"))
    chooser = element(
        "fieldset",
        element("legend", question) + element("div", Markup("").join(buttons), class_="chips"),
        class_="choose",
    )
    rules = "".join(
        f"#{name}:has(#{name}-{k}:checked) .k{k}{{display:inline}}" for k in range(len(choices))
    )
    style = Markup(f"<style>#{name} .k{{display:none}}{rules}</style>")
    drawn = Markup("").join(_panel(p, choices, tasks, most) for p in items)
    grid = element("div", drawn, class_="multiples")
    return element(
        "div", style + (chooser if len(choices) > 1 else "") + grid, id=name, class_="curves"
    )


def _panel(item: Panel, choices: Sequence[str], tasks: int, most: int) -> Markup:
    across = Scale(0, tasks, _LEFT, _WIDTH - _RIGHT)
    up = Scale(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP)
    parts = []
    for k in range(tasks):
        left, right = across(k), across(k + 1)
        if k % 2:
            parts.append(
                element(
                    "rect",
                    x=left,
                    y=_TOP,
                    width=round(right - left, 2),
                    height=_HEIGHT - _TOP - _BOTTOM,
                    class_="band",
                )
            )
        if k:
            parts.append(
                element("line", x1=left, x2=left, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="border")
            )
        if right - left > 12 or k in {0, tasks - 1}:
            words = f"task {k + 1}" if right - left > 38 else str(k + 1)
            parts.append(text((left + right) / 2, _HEIGHT - 8, words, class_="tick middle"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = up(share)
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        if share in {0.0, 0.5, 1.0}:
            parts.append(text(_LEFT - 5, y + 4, f"{100 * share:.0f}", class_="tick end"))
    for k in range(len(choices)):
        mine = sorted((line for line in item.lines if line.key == k), key=lambda line: line.main)
        drawn = []
        for line in mine:
            place = np.interp(line.x, item.borders, np.arange(len(item.borders)))
            x, y = thin(place, line.y, most)
            points = [across(v) for v in x.tolist()], [up(v) for v in y.tolist()]
            drawn.append(polyline(*points, class_="main" if line.main else "seed"))
        if not drawn:
            middle = (_LEFT + _WIDTH - _RIGHT) / 2
            drawn.append(text(middle, _HEIGHT / 2, "not measured", class_="tick middle"))
        parts.append(group(drawn, class_=f"k k{k}"))
    summary = f"{item.title}: accuracy in per cent over training steps. {item.note}"
    picture = element(
        "svg",
        Markup("").join(parts),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=summary,
        class_=f"plot c{item.series}",
    )
    return element("div", panel_head(item.title, item.series, item.note) + picture, class_="panel")
