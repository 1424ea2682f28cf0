"""Matrices of shares as small tables with coloured cells, the numbers written in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from guywire.lab.report.figures.curves import panel_head
from guywire.lab.report.figures.svg import element
from guywire.lab.report.palette import HEAT_LEVELS

__all__ = ["Matrix", "matrices"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of shares between 0 and 1.

    Attributes:
        title: what it belongs to.
        series: index of its mark.
        values: rows of shares; None leaves a cell empty.
        note: a few words beside the title.
    """

    title: str
    series: int
    values: Sequence[Sequence[float | None]]
    note: str = ""


def matrices(items: Sequence[Matrix], names: Sequence[str], *, rows: str, columns: str) -> Markup:
    """Small multiples of matrices.

    Args:
        items: the matrices, each at most ``[T, T]``.
        names: short names of the T rows and columns.
        rows: what a row stands for, e.g. ``"after training on"``.
        columns: what a column stands for, e.g. ``"accuracy on"``.

    Returns:
        Markup of one table a matrix; per cent, rounded to whole numbers.
    """
    return element(
        "div",
        Markup("").join(_one(m, names, rows, columns) for m in items),
        class_="multiples heats" if len(names) > 5 else "multiples heats few",
    )


def _one(item: Matrix, names: Sequence[str], rows: str, columns: str) -> Markup:
    width = max((len(r) for r in item.values), default=0)
    heads = [element("td", Markup("after ↓<br>on →"), class_="corner")]
    heads += [element("th", names[k], scope="col") for k in range(width)]
    body = []
    for i, row in enumerate(item.values):
        cells = [element("th", names[i], scope="row")]
        for value in [*row, *[None] * (width - len(row))]:
            if value is None:
                cells.append(element("td", element("span", "none", class_="sr"), class_="none"))
            else:
                level = min(max(math.floor(value * (HEAT_LEVELS - 1) + 0.5), 0), HEAT_LEVELS - 1)
                cells.append(element("td", f"{100 * value:.0f}", class_=f"h{level}"))
        body.append(element("tr", Markup("").join(cells)))
    table = element(
        "table",
        element(
            "caption",
            f"{item.title}: {columns} the task of the column, {rows} the task of the row, per cent",
            class_="sr",
        )
        + element("thead", element("tr", Markup("").join(heads)))
        + element("tbody", Markup("").join(body)),
        class_="heat" + (" dense" if width > 7 else ""),
    )
    scroll = element(
        "div",
        table,
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=f"{item.title}: accuracy matrix",
    )
    return element("div", panel_head(item.title, item.series, item.note) + scroll, class_="panel")
