"""The page that every report is set on: sections of prose, tables, figures, pictures and code.

A page is plain data. `write_page` turns it into one HTML file that needs no network: style and
script are inlined, figures are SVG or HTML, pictures are data URIs. All text is untrusted and
escaped by the template; only a figure's ``body`` is markup, made by `guywire.lab.report.figures`.

Example:
    >>> page = Page(title="A study", kicker="guywire study", headline="It came out.")
    >>> html = render_page(page)
    >>> "It came out." in html and "http://" not in html
    True
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from guywire.core.errors import need
from guywire.core.writing import write_text
from guywire.lab.report.palette import stylesheet

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

__all__ = [
    "Cell",
    "Code",
    "Column",
    "Figure",
    "Notice",
    "Page",
    "Picture",
    "Pictures",
    "Prose",
    "Section",
    "Table",
    "data_uri",
    "render_page",
    "write_page",
]


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        detail: a second, smaller line (an interval, say).
        sort: what the column is sorted by; the text when None.
        series: index of a series whose mark stands before the text.
        href: a link to another page or section.
    """

    text: str
    detail: str = ""
    sort: float | str | None = None
    series: int | None = None
    href: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading; ``hint`` is a second line in small type (the unit, say)."""

    label: str
    numeric: bool = False
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column heads its rows.

    Attributes:
        caption: what it shows, in one line.
        columns: the headings.
        rows: as many cells a row as there are columns.
        sortable: whether a click on a heading sorts.
        note: small print under it.
        folded: hidden behind its caption until asked for.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sortable: bool = False
    note: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with the numbers behind it.

    Attributes:
        title: a heading that says what is compared; empty where the section's heading says it.
        body: trusted markup; everything in it has been escaped by its maker.
        caption: how to read it.
        table: the data, shown on demand.
    """

    kind: ClassVar[str] = "figure"
    title: str
    body: Markup
    caption: str
    table: Table | None = None


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Something to copy: a command or a file; ``folded`` hides it until asked for."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """One card of samples: a picture, or texts with a small label each."""

    title: str
    detail: str = ""
    source: str = ""
    alt: str = ""
    texts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Pictures:
    """A row of cards."""

    kind: ClassVar[str] = "pictures"
    items: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the reader must know first; ``items`` is a list under it."""

    text: str
    items: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with blocks under it; ``slug`` is its anchor, ``lead`` its first sentence."""

    slug: str
    title: str
    blocks: tuple[Prose | Table | Figure | Code | Pictures, ...]
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page.

    Attributes:
        title: the page's heading.
        kicker: small type over the heading: which command made it.
        headline: the finding, in one sentence.
        remarks: further sentences that qualify it.
        facts: name and value pairs under the headline.
        notices: what went wrong or is missing.
        sections: the body.
        footer: small print.
        back: a link to an index, ``(text, href)``.
    """

    title: str
    kicker: str = ""
    headline: str = ""
    remarks: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    notices: tuple[Notice, ...] = ()
    sections: tuple[Section, ...] = ()
    footer: str = ""
    back: tuple[str, str] | None = None


def data_uri(png: bytes) -> str:
    """PNG bytes as a source for an image inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def render_page(page: Page) -> str:
    """Set a page.

    Args:
        page: what to show.

    Returns:
        One self-contained HTML document.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    return _environment().get_template("report.html.j2").render(page=page)


def write_page(page: Page, path: Path) -> Path:
    """Set a page and write it in one atomic step.

    Args:
        page: what to show.
        path: the HTML file; it is either replaced whole or left as it was.

    Returns:
        The path.

    Raises:
        MissingExtraError: jinja2 is not installed.
        CheckpointError: the file cannot be written.
    """
    write_text(path, render_page(page))
    return path


@cache
def _environment() -> jinja2.Environment:
    module = need("jinja2", extra="report")
    markup = need("markupsafe", extra="report").Markup
    environment = module.Environment(
        loader=module.PackageLoader("guywire.lab.report"),
        autoescape=True,
        undefined=module.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("guywire.lab.report") / "templates"
    # Our own files, not anyone's text: they go in as they are.
    css = stylesheet() + "\n" + (folder / "page.css").read_text(encoding="utf-8")
    from guywire.lab.report.figures.svg import swatch  # needs markupsafe, so not above

    environment.globals["swatch"] = swatch
    environment.globals["css"] = markup(css)
    environment.globals["js"] = markup((folder / "page.js").read_text(encoding="utf-8"))
    return environment
