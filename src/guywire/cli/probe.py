"""``guywire probe``: diagnostics of checkpoints that you have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guywire.cli import console
from guywire.core.errors import UsageError

if TYPE_CHECKING:
    from guywire.diagnostics import Connectivity
    from guywire.lab.models.ends import Ends

__all__ = ["register"]

_HELP = """
Walk the straight line between two checkpoints of one model, and evaluate it on the way.

START and END are two Hugging Face folders, two folders of PEFT adapters of one base, or two
`.safetensors` files (then `--model` says of which architecture). A *barrier* near zero means that
both lie in one valley: their average is a model too. Where accuracy is best inside, averaging the
two balances what each knows; choose the point on validation data, not on the data you report.

Give the old task's data and the new one's, each under a name:

`guywire probe connectivity run/task1 run/task2 --data old=old.jsonl --data new=new.jsonl`

Causal language models read texts (`.txt`, a text a line, or a column of `.jsonl`, `.csv`, `.tsv`);
text classifiers read a column of texts and one of labels; image classifiers read what
`guywire compare --data` reads (a folder of images by class, `digits`, a parquet file).
"""


def register(app: typer.Typer) -> None:
    """Add the commands.

    Args:
        app: the application.
    """
    probes = typer.Typer(
        help="Look into checkpoints that you have.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
    )
    probes.command("connectivity", help=_HELP)(_connectivity)

    @probes.callback()
    def top() -> None:  # keeps 'connectivity' a word of its own while it is the only probe
        pass

    app.add_typer(probes, name="probe")


def _connectivity(
    start: Annotated[Path, typer.Argument(help="The first checkpoint (position 0).")],
    end: Annotated[Path, typer.Argument(help="The second checkpoint (position 1).")],
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="[NAME=]PATH", help="What to evaluate on; repeat it."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Base of the adapters, or architecture of bare tensors."),
    ] = None,
    points: Annotated[int, typer.Option("--points", help="Positions, both ends included.")] = 11,
    text_column: Annotated[str, typer.Option("--text-column", help="Of texts.")] = "text",
    label_column: Annotated[str, typer.Option("--label-column", help="Of labels.")] = "label",
    samples: Annotated[
        int, typer.Option("--samples", help="At most so many of each set, drawn once; 0 for all.")
    ] = 500,
    length: Annotated[int, typer.Option("--length", help="Tokens of a text, at most.")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples a forward pass.")] = 16,
    renew: Annotated[
        bool,
        typer.Option("--renew-statistics", help="Of BatchNorm layers, on the inputs of --data."),
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON document here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    for name, value in (("--batch-size", batch_size), ("--length", length)):
        if value < 1:
            raise UsageError(f"{name} {value} must be at least 1")
    if points < 3:
        raise UsageError(f"--points {points}: two ends and a point between them make 3 at least")
    if samples < 0:
        raise UsageError(f"--samples {samples} must be at least 0, which means all")
    if out is not None and not out.resolve().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}")
    named = _named(data)

    from guywire.core import writing
    from guywire.diagnostics.connectivity import connectivity, moving_statistics
    from guywire.lab.models.ends import load_ends

    ends = load_ends(start, end, model)
    moving = moving_statistics(ends.model, ends.start, ends.end)
    if moving is not None and not renew:
        raise UsageError(
            f"the two checkpoints differ in the running statistics of {moving!r}, and statistics in "
            "between belong to no weights: add --renew-statistics to compute them on the way"
        )
    evals = {
        name: _batches(path, ends, text_column, label_column, samples or None, length, batch_size)
        for name, path in named.items()
    }
    shown = [batch for batches in evals.values() for batch in batches] if renew else None
    with _Progress(points, quiet=as_json) as progress:
        found = connectivity(
            ends.model,
            ends.start,
            ends.end,
            evals,
            points=points,
            statistics=shown,
            each=progress,
        )
    document = {
        "start": str(start),
        "end": str(end),
        "adapters": ends.adapters,
        "data": named,
        **found.to_json(),
    }
    if out is not None:
        writing.write_json(out, document)
    if as_json:
        console.print_json(document)
    else:
        _print(found, out)


def _named(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, sign, path = word.partition("=")
        if not sign:
            name, path = Path(word).name.split(".")[0] or word, word
        if not name or not path:
            raise UsageError(f"--data {word!r}: write PATH or NAME=PATH")
        if name in found:
            raise UsageError(f"two --data are called {name!r}: name them, as in old=FILE")
        if name == "all":
            raise UsageError("--data all=...: 'all' is the mean over the sets, use another name")
        found[name] = path
    return found


def _batches(
    path: str,
    ends: Ends,
    text: str,
    label: str,
    samples: int | None,
    length: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    from guywire.lab.models import evals

    config: Any = ends.model.config
    if ends.kind == "image":
        return evals.image_batches(
            path, ends.source, config, samples=samples, batch_size=batch_size
        )
    import torch

    rows = evals.read_texts(Path(path), text, label if ends.kind == "text" else None)
    if samples is not None and samples < len(rows):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = [rows[i] for i in sorted(order[:samples].tolist())]
    return evals.text_batches(rows, ends.source, config, length=length, batch_size=batch_size)


class _Progress:
    """Positions done, on standard error: a bar where somebody looks on."""

    def __init__(self, points: int, *, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        screen = console.log()
        self._bar = Progress(
            TextColumn("positions"), BarColumn(bar_width=24), MofNCompleteColumn(),
            console=screen, transient=True, disable=quiet or not screen.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("positions", total=points)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, position: float) -> None:
        self._bar.advance(self._task)


def _print(found: Connectivity, out: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console.out()
    names = [name for name in found.loss if name != "all" or len(found.loss) > 2]
    table = Table(title=f"From start (0) to end (1), distance {found.distance:.4g}")
    table.add_column("position", justify="right")
    for name in names:
        table.add_column(f"{name}: loss", justify="right")
        table.add_column("accuracy", justify="right")
    for i, position in enumerate(found.positions):
        cells = [f"{position:.2f}"]
        for name in names:
            cells += [f"{found.loss[name][i]:.4f}", f"{100 * found.accuracy[name][i]:.1f}"]
        table.add_row(*cells)
    screen.print(table)
    for name in names:
        at = found.best(name, metric="accuracy")
        gain = 100 * found.gain(name, metric="accuracy")
        screen.print(
            Text(
                f"{name}: barrier {found.barrier(name):.4f}; best accuracy at {at:.2f}, "
                f"{gain:.1f} points above the better end"
            )
        )
    if out is not None:
        screen.print(Text(f"written to {out}", style="dim"))
