"""``guywire methods``: what there is, from which paper, when to use it."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from guywire.cli import console
from guywire.core.errors import UsageError

__all__ = ["card", "register"]

_HELP = """
List the methods, or tell all about one: what it does, when to use it, its options, its paper.

Examples:

- `guywire methods`

- `guywire methods ewc`
"""


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: the application.
    """
    app.command("methods", help=_HELP)(_methods)


def card(name: str) -> dict[str, Any]:
    """Return all that is known about a method, read off its class.

    Args:
        name: as in ``--methods``.

    Returns:
        ``name``, ``kind``, ``summary``, ``when``; of methods of the library also ``place``,
        ``title``, ``arxiv``, ``memory``, ``passes`` and ``export``; ``options`` of those that have
        any.

    Raises:
        UsageError: no such method.
    """
    from guywire.lab.training.config import nearest
    from guywire.lab.training.parts import PARTS

    if name not in PARTS:
        raise UsageError(f"there is no method {name!r}: {nearest(name, PARTS)}")
    part = PARTS[name]
    facts: dict[str, Any] = {
        "name": part.name,
        "kind": part.kind,
        "summary": part.summary,
        "when": part.when,
    }
    cls = part.cls
    options = {
        key: {"default": part.defaults.get(key, default), "help": text}
        for key, (_, default, text) in part.extra.items()
    }
    if cls is None:
        return facts | {"options": options} if options else facts
    described = _arguments(cls)
    for key, parameter in inspect.signature(cls).parameters.items():
        default = part.defaults.get(key, parameter.default)
        plain = isinstance(default, bool | int | float | str | type(None))
        options[key] = {
            "default": default if plain else repr(default),
            "help": described.get(key, ""),
        }
    return facts | {
        "export": f"guywire.{part.export}",
        "place": cls.place,
        "title": cls.title,
        "arxiv": cls.arxiv,
        "memory": cls.memory,
        "passes": cls.passes,
        "options": options,
    }


def _methods(
    name: Annotated[str | None, typer.Argument(help="One method.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    from guywire.lab.training.parts import PARTS

    cards = [card(known) for known in (PARTS if name is None else [name])]
    if as_json:
        console.print_json({"methods": cards} if name is None else cards[0])
    elif name is None:
        _list(cards)
    else:
        _tell(cards[0])


def _list(cards: list[dict[str, Any]]) -> None:
    table = Table()
    for heading in ("method", "what it does", "acts on", "extra memory", "extra passes", "paper"):
        table.add_column(heading)
    for facts in cards:
        baseline = facts["kind"] == "baseline"
        table.add_row(
            facts["name"],
            facts["summary"],
            "baseline" if baseline else f"the {facts['place']}",
            facts.get("memory", ""),
            facts.get("passes", ""),
            f"arXiv {facts['arxiv']}" if facts.get("arxiv") else "",
        )
    screen = console.out()
    screen.print(table)
    screen.print(
        "Extra memory in multiples of the parameters held. Combine with +, as ewc+replay. "
        "`guywire methods NAME` tells the options.",
        markup=False,
    )


def _tell(facts: dict[str, Any]) -> None:
    screen = console.out()
    screen.print(f"[bold]{facts['name']}[/bold]: {escape(facts['summary'])}")
    screen.print(escape(facts["when"]))
    if not facts.get("options"):
        return
    screen.print()
    for label, key in (
        ("in your own loop", "export"),
        ("acts on", "place"),
        ("paper", "title"),
        ("arXiv", "arxiv"),
        ("extra memory (parameters)", "memory"),
        ("extra passes", "passes"),
    ):
        if facts.get(key):
            screen.print(f"{label}: {facts[key]}", markup=False)
    table = Table(title="options", title_justify="left")
    for heading in ("--option", "default", "meaning"):
        table.add_column(heading)
    for key, option in facts["options"].items():
        table.add_row(
            f"{facts['name']}.{key}", escape(str(option["default"])), escape(option["help"])
        )
    screen.print(table)


def _arguments(cls: type) -> dict[str, str]:
    """Read the arguments' meanings off a Google-style docstring."""
    text = inspect.getdoc(cls) or ""
    found = re.search(r"^Args:\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    meanings: dict[str, str] = {}
    key = ""
    for line in (found.group(1) if found else "").splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            key = start.group(1)
            meanings[key] = start.group(2)
        elif key and line.strip():
            meanings[key] += " " + line.strip()
    return {key: text.replace("``", "") for key, text in meanings.items()}
