"""What two measures do as one option moves: one panel a method and option, the choice marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from guywire.lab.report.figures.curves import panel_head
from guywire.lab.report.figures.svg import Scale, element, group, marker, polyline, text, ticks

__all__ = ["Dose", "Response", "responses"]

_WIDTH, _HEIGHT = 340, 214
_LEFT, _RIGHT, _TOP, _BOTTOM = 30, 10, 24, 40
_MEASURES = (("accuracy", False), ("forgetting", True))


@dataclass(frozen=True, slots=True)
class Dose:
    """One value of the option.

    Attributes:
        value: a number or a word.
        accuracy: one share a seed; none where training diverged.
        forgetting: likewise.
        chosen: this is what the comparison ran with.
    """

    value: float | str
    accuracy: Sequence[float]
    forgetting: Sequence[float]
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """One panel.

    Attributes:
        title: the method.
        option: what is across.
        series: index of the method's series.
        doses: what was tried.
        log: a logarithmic axis.
        joined: means are joined by lines; not so where other options moved as well.
        note: a few words beside the title.
        summary: the panel in words, for those who cannot see it.
    """

    title: str
    option: str
    series: int
    doses: Sequence[Dose]
    log: bool
    joined: bool
    note: str
    summary: str


def responses(items: Sequence[Response]) -> Markup:
    """Draw the panels, with a key above.

    Args:
        items: the panels.

    Returns:
        Markup.
    """
    key = Markup("").join(
        element(
            "span",
            element(
                "svg",
                element("line", x1=0, x2=28, y1=6, y2=6, class_=_line(dashed)),
                viewBox="0 0 28 12",
                class_="key-line",
                aria_hidden="true",
            )
            + f" {name}",
        )
        for name, dashed in _MEASURES
    )
    key += element("span", "dotted upright: the value chosen")
    drawn = Markup("").join(_panel(item) for item in items)
    return element("p", key, class_="key small") + element("div", drawn, class_="multiples")


def _line(dashed: bool) -> str:
    return "main dashed" if dashed else "main"


def _panel(item: Response) -> Markup:
    shares = [v for d in item.doses for v in (*d.accuracy, *d.forgetting)]
    bottom = min(0.0, math.floor(10 * min(shares, default=0.0)) / 10)
    up = Scale(bottom, 1.0, _HEIGHT - _BOTTOM, _TOP)
    place, labels = _across(item)
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = up(share)
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        if share in {0.0, 0.5, 1.0}:
            parts.append(text(_LEFT - 5, y + 4, f"{100 * share:.0f}", class_="tick end"))
    for x, words in labels:
        parts.append(element("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="grid"))
        parts.append(text(x, _HEIGHT - _BOTTOM + 15, words, class_="tick middle"))
    parts.append(text(4, 12, "%", class_="axis"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(text(middle, _HEIGHT - 6, item.option, class_="axis middle"))
    for dose in item.doses:
        x = place(dose)
        if dose.chosen:
            y1, y2 = _TOP - 6, _HEIGHT - _BOTTOM
            parts.append(element("line", x1=x, x2=x, y1=y1, y2=y2, class_="chosen"))
            words = _plain(dose.value)
            side = "end" if x > _WIDTH - 60 else "middle" if x > 60 else ""
            parts.append(text(x, _TOP - 11, words, class_=f"label {side}".strip()))
        if not dose.accuracy:
            y = _HEIGHT - _BOTTOM - 8
            parts.append(text(x, y, "×", class_="label middle"))
    for name, dashed in _MEASURES:
        known = [(place(d), getattr(d, name), d) for d in item.doses if getattr(d, name)]
        dots = [
            element("circle", cx=x, cy=up(v), r=2.4, class_="dot")
            for x, values, _ in known
            if len(values) > 1
            for v in values
        ]
        means = [(x, up(math.fsum(values) / len(values)), d) for x, values, d in known]
        if item.joined:
            xs, ys = [m[0] for m in means], [m[1] for m in means]
            parts.append(group([*dots, polyline(xs, ys, class_=_line(dashed))]))
        else:
            parts.append(group(dots))
        for x, y, dose in means:
            size = 5.5 if dose.chosen else 3.4
            said = f"{name} at {item.option} = {_plain(dose.value)}"
            parts.append(marker(item.series, x, y, size, title=said))
    picture = element(
        "svg",
        Markup("").join(parts),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=item.summary,
        class_=f"plot response c{item.series}",
    )
    return element("div", panel_head(item.title, item.series, item.note) + picture, class_="panel")


def _across(item: Response) -> tuple[Place, list[tuple[float, str]]]:
    values = [d.value for d in item.doses]
    start, end = _LEFT + 14, _WIDTH - _RIGHT - 14
    numbers = [v for v in values if not isinstance(v, str)]
    if len(numbers) < len(values) or min(numbers) == max(numbers):
        words = list(dict.fromkeys(map(_plain, values)))
        scale = Scale(-0.5, len(words) - 0.5, start, end)
        every = -(-len(words) // 6)
        labels = [(scale(k), w) for k, w in enumerate(words) if k % every == 0]
        return Place(scale, words=words), labels
    low, high = min(numbers), max(numbers)
    if item.log and low > 0:
        scale = Scale(math.log10(low), math.log10(high), start, end)
        first, last = math.ceil(scale.low - 1e-9), math.floor(scale.high + 1e-9)
        step = max(1, -(-(last - first + 1) // 6))
        marks = [10.0**k for k in range(first, last + 1, step)]
        if len(marks) < 2:
            marks = [low, high]
        return Place(scale, log=True), [(scale(math.log10(m)), _plain(m)) for m in marks]
    scale = Scale(low, high, start, end)
    return Place(scale), [(scale(m), _plain(m)) for m in ticks(low, high, 5)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a dose stands across a panel."""

    scale: Scale
    log: bool = False
    words: Sequence[str] = ()

    def __call__(self, dose: Dose) -> float:
        """The place in the picture."""
        if self.words:
            return self.scale(self.words.index(_plain(dose.value)))
        value = float(dose.value)
        return self.scale(math.log10(value) if self.log else value)


def _plain(value: float | str) -> str:
    if isinstance(value, str):
        return value if len(value) <= 12 else value[:11] + "…"
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
