"""``guywire study``: run a paper's claim in miniature, and say what came out."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer

from guywire.cli import console
from guywire.core.errors import GuywireError, UsageError

__all__ = ["register", "study"]

_COLOURS = {
    "reproduced": "green",
    "not reproduced": "red",
    "inconclusive": "yellow",
    "smoke": "cyan",
}


def register(app: typer.Typer) -> None:
    """Add the command to the application.

    Args:
        app: the application.
    """
    app.command("study")(study)


def study(
    slugs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SLUG]...", help="Studies, or Python files that define STUDY."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All studies.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Seconds instead of minutes; claims nothing.")
    ] = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="How many seeds.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes, one thread each; one a core.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of results.")] = Path("studies"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Compute again what is known already.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the gallery of all results in the folder.")
    ] = False,
    listing: Annotated[bool, typer.Option("--list", help="Say what studies there are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="Your own data, where the study takes them.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Your own model, e.g. hf:t5-small.")
    ] = None,
    source_column: Annotated[
        str | None, typer.Option("--source-column", help="Of --data: what is read.")
    ] = None,
    target_column: Annotated[
        str | None, typer.Option("--target-column", help="Of --data: what is written.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option("--group-column", help="Of --data: patient; never split.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting; may be repeated."),
    ] = None,
) -> None:
    """Run a paper's claim in miniature: what it says, what came out, the verdict."""
    from guywire.lab.studies import STUDIES

    if listing:
        _print_list(as_json)
        return
    names = list(dict.fromkeys(slugs or ()))
    if everything:
        names += [slug for slug in STUDIES if slug not in names]
    if not names and not report:
        raise UsageError(f"name a study, or --all: there are {', '.join(STUDIES)}")
    flags = {
        "data": data,
        "model": model,
        "source_column": source_column,
        "target_column": target_column,
        "group_column": group_column,
    }
    overrides = {key: value for key, value in flags.items() if value is not None}
    overrides |= dict(_assignment(text) for text in settings or ())

    results, broken = _run(
        names,
        out,
        smoke=smoke,
        seeds=seeds,
        overrides=overrides,
        workers=workers,
        fresh=fresh,
        quiet=as_json,
    )
    document: dict[str, Any] = {"studies": results, "failed": broken}
    if report:
        from guywire.lab.report import gallery

        document["gallery"] = str(gallery.write(out))
        if not as_json:
            console.out().print(f"gallery: {document['gallery']}", markup=False)
    if as_json:
        console.print_json(document)
    if broken or not all(check["holds"] for r in results for check in r["checks"]):
        raise typer.Exit(1)


def _run(
    names: list[str], out: Path, *, quiet: bool, workers: int | None, **arguments: Any
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Run the studies; one that fails does not keep the others from running."""
    from guywire.lab.studies import load
    from guywire.lab.studies.runner import resolve

    for name in names:  # refuse wrong words before anything runs
        resolve(load(name), smoke=arguments["smoke"], overrides=arguments["overrides"])
    results: dict[str, dict[str, Any]] = {}
    broken: list[dict[str, str]] = []
    with _Progress() as progress:
        for name, result in _each(names, out, progress, workers, arguments):
            if isinstance(result, GuywireError):
                if len(names) == 1 or isinstance(result, UsageError):
                    raise result
                broken.append({"study": name, "error": str(result)})
                console.log().print(f"{name}: {result}", style="red", markup=False)
                continue
            results[name] = _plain(result)
            if not quiet:
                _print_result(result)
    return [results[name] for name in names if name in results], broken


def _each(
    names: list[str],
    out: Path,
    progress: _Progress,
    workers: int | None,
    arguments: dict[str, Any],
) -> Iterator[tuple[str, dict[str, Any] | GuywireError]]:
    """Yield what came of each study as it ends, several at a time over one crew of processes."""
    from guywire.lab.studies.pool import crew_of
    from guywire.lab.studies.runner import cores, run_study

    def one(name: str, **more: Any) -> dict[str, Any] | GuywireError:
        try:
            return run_study(name, out, progress=progress.of(name), **more, **arguments)
        except GuywireError as error:
            return error
        finally:
            progress.ended(name)

    count = workers or cores()
    if len(names) < 2 or count < 2:
        for name in names:
            yield name, one(name, workers=workers)
        return
    # One study more than there are processes: enough to fill the waits at the ends of stages.
    with crew_of(count) as crew, ThreadPoolExecutor(count + 1) as threads:
        futures = {threads.submit(one, name, crew=crew): name for name in names}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # Ctrl-C: end the processes first, or the threads wait for them
            threads.shutdown(wait=False, cancel_futures=True)
            crew.stop(kill=True)
            raise


class _Progress:
    """Units done of those known so far, on standard error: bars, or lines where nobody looks on."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
        )

        self._screen = console.log()
        self._bar = Progress(
            TextColumn("{task.fields[title]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._screen,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Progress:
        if self._screen.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def of(self, name: str) -> Callable[[int, int, str], None]:
        """Return what a study tells its progress to."""
        title = Path(name).stem
        task = self._tasks[name] = self._bar.add_task("starting", title=title, total=None)

        def tell(done: int, known: int, text: str) -> None:
            self._bar.update(task, completed=done, total=known, description=text[:60])
            if text and not self._screen.is_terminal:
                self._screen.print(f"{title}: {done} of {known} units, {text}", markup=False)

        return tell

    def ended(self, name: str) -> None:
        """Take a study's bar away."""
        self._bar.remove_task(self._tasks.pop(name))


def _assignment(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(f"--set {text!r}: write KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return key, value  # a bare word is a string


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    keep = ("slug", "title", "size", "claims", "checks", "choices", "cost", "seeds", "folder")
    return {key: result[key] for key in keep}


def _print_list(as_json: bool) -> None:
    from guywire.lab.studies import STUDIES, load

    entries = [
        {
            "slug": slug,
            "title": (found := load(slug)).title,
            "paper": found.paper,
            "claims": [{"name": c.name, "says": c.says, "rule": c.rule} for c in found.claims],
            "seeds": found.seeds,
            "minutes": found.minutes,
        }
        for slug in STUDIES
    ]
    if as_json:
        console.print_json({"studies": entries})
        return
    from rich.text import Text

    screen = console.out()
    for entry in entries:
        minutes = f"about {entry['minutes']:g} min on two cores, {entry['seeds']} seeds"
        screen.print(Text.assemble((entry["slug"], "bold"), "  ", (minutes, "dim")))
        screen.print(Text(f"  {entry['title']} ({entry['paper']})"))
        for claim in entry["claims"]:
            screen.print(Text(f"  {claim['name']}: {claim['says']}"))
        screen.print()


def _print_result(result: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console.out()
    cost = result["cost"]
    table = Table(title=f"{result['slug']} ({result['size']})", title_justify="left", expand=False)
    table.add_column("claim")
    table.add_column("the paper says")
    table.add_column("verdict")
    table.add_column("the numbers allow")
    for claim in result["claims"]:
        verdict = Text(claim["verdict"], style=_COLOURS[claim["verdict"]])
        table.add_row(claim["name"], Text(claim["says"]), verdict, Text(claim["allows"]))
    screen.print(table)
    for check in result["checks"]:
        mark = (
            Text("holds  ", style="green") if check["holds"] else Text("FAILS  ", style="bold red")
        )
        screen.print(mark + Text(check["says"]))
    for choice in result["choices"]:
        edge = (
            " (still at the edge of its grid)"
            if choice["on_edge"] and not choice["plateau"]
            else ""
        )
        tried = ", ".join(f"{value:g}" for value in choice["grid"])
        screen.print(Text(f"chose {choice['best']:g} for {choice['name']} of {tried}{edge}", "dim"))
    screen.print(
        Text(
            f"{len(result['seeds'])} seeds, {cost['units']} units, {cost['wall_seconds']:.0f} s, "
            f"{cost['peak_memory_mb']:.0f} MB a process; result in {result['folder']}",
            "dim",
        )
    )
