"""``guywire runs``: list the runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from guywire.cli import console

__all__ = ["register"]

_HELP = """
List the runs in a folder, newest first: what they are, how far they came, where the report is.

Example: `guywire runs runs`
"""


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: the application.
    """
    app.command("runs", help=_HELP)(_runs)


def _runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    from guywire.lab.training.run import list_runs

    found = list_runs(folder)
    if as_json:
        console.print_json({"runs": found})
        return
    table = Table()
    for heading in ("run", "status", "started", "data", "scenario", "methods", "seeds", "trials"):
        table.add_column(heading, overflow="fold")
    for run in found:
        if run["status"] == "damaged":
            table.add_row(escape(run["path"]), "damaged", *[""] * 6)
            continue
        table.add_row(
            escape(run["path"]),
            run["status"],
            run["started"] or "",
            escape(run["data"]),
            run["scenario"],
            escape(", ".join(run["methods"])),
            str(run["seeds"]),
            f"{run['trials_done']}/{run['trials']}",
        )
    if found:
        console.out().print(table)
    else:
        console.out().print(f"no runs in {folder}", markup=False)
