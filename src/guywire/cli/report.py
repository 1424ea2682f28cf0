"""``guywire report``: render a run's report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guywire.cli import console
from guywire.core.errors import UsageError

__all__ = ["register"]

_HELP = """
Write `report.html` of a run again, from the files in its folder; a run that is not finished gives
a report that says so.

Example: `guywire report runs/digits-class-20260101-120000`
"""


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: the application.
    """
    app.command("report", help=_HELP)(_report)


def _report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    from guywire.lab.report import render

    if not run.is_dir():
        raise UsageError(f"there is no run {run}: `guywire runs` lists those in runs/")
    path = render(run)
    if as_json:
        console.print_json({"run": str(run), "report": str(path)})
    else:
        console.out().print(str(path), markup=False)
