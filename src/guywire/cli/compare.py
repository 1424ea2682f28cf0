"""``guywire compare``: a stream of tasks, methods, seeds; a table and a report."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from guywire.cli import console, settings, sweeps
from guywire.cli.progress import Display
from guywire.core.errors import GuywireError, MissingExtraError

__all__ = ["register", "results_table"]

_HELP = """
Train a model through a stream of tasks with several methods and seeds, and say what each forgot.

Without arguments: five class-incremental tasks of handwritten digits, a small model, six methods
and joint training as the ceiling, three seeds; about a minute on two cores.

Examples:

- `guywire compare` : the default, to see what comes out

- `guywire compare --data mnist --methods finetune,ewc,lwf,replay --seeds 5`

- `guywire compare --data pictures/ --model vit --scenario task --tasks 4 --epochs 3`

- `guywire compare --data faces.parquet --image-column photo --label-column who --domain-column
camera --scenario domain`

- `guywire compare --methods ewc,replay,ewc+replay --option ewc.strength=1000
--option replay.capacity=50`

- `guywire compare study.toml --seeds 10` : settings from a file, one of them overridden

- `guywire compare study.toml --on ray://head:10001` : the trials run on a Ray cluster

- `guywire compare sweep.toml` : strengths tuned on validation data first, by a table `[sweep]`

- `guywire compare --out runs/x --resume` : go on with a run that was stopped or killed

`guywire methods` lists the methods and their options. A file holds what `config.toml` in a run's
folder holds. Results (with 95% intervals over seeds) are in `results.parquet` and
`report.html` of the run's folder.
"""

_COLUMNS = (
    ("accuracy %", "accuracy", 100.0, 1),
    ("forgetting %", "forgetting", 100.0, 1),
    ("backward transfer %", "backward_transfer", 100.0, 1),
    ("min-ACC %", "min_acc", 100.0, 1),
    ("WC-ACC %", "wc_acc", 100.0, 1),
    ("seconds", "seconds", 1.0, 1),
    ("extra MB", "extra_memory_mb", 1.0, 2),
)

_DATA, _TRAIN, _RUN = "Data", "Training", "Run"


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: the application.
    """
    app.command("compare", help=_HELP)(_compare)


def results_table(results: list[dict[str, Any]], title: str = "") -> Table:
    """Lay aggregated results out for the screen.

    Args:
        results: one dict a method, see :func:`guywire.lab.training.aggregate`.
        title: above the table.

    Returns:
        The table.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading, *_ in _COLUMNS:
        table.add_column(heading, justify="right")
    seeds = {entry["seeds"] for entry in results}
    for entry in results:
        fewer = f" ({entry['seeds']} seeds)" if entry["seeds"] < max(seeds) else ""
        cells = [
            console.number(entry[name], scale, digits).replace(" [", "\n[")
            for _, name, scale, digits in _COLUMNS
        ]
        table.add_row(escape(entry["method"] + fewer), *map(escape, cells))
    return table


def _option(*names: str, text: str, panel: str, metavar: str | None = None) -> Any:
    # Numbers come as words and are read with all other settings: one way to say what is wrong.
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)


def _compare(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file with settings; flags override it.")
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "--data",
            text="digits, mnist, fashion-mnist, renditions, a folder of images by class, a parquet "
            "file, a folder of IDX files, or hf:NAME.",
            panel=_DATA,
        ),
    ] = None,
    scenario: Annotated[
        str | None,
        _option(
            "--scenario",
            text="class: new classes, all in one head; task: new classes, the task is given; "
            "domain: the same classes in new domains.",
            panel=_DATA,
        ),
    ] = None,
    tasks: Annotated[
        str | None, _option("--tasks", text="How many tasks.", panel=_DATA, metavar="N")
    ] = None,
    image_column: Annotated[
        str | None, _option("--image-column", text="Column of images.", panel=_DATA)
    ] = None,
    text_column: Annotated[
        str | None, _option("--text-column", text="Column of texts (a+b joins).", panel=_DATA)
    ] = None,
    label_column: Annotated[
        str | None, _option("--label-column", text="Column of classes.", panel=_DATA)
    ] = None,
    domain_column: Annotated[
        str | None,
        _option("--domain-column", text="Column of domains, in order of appearance.", panel=_DATA),
    ] = None,
    subject_column: Annotated[
        str | None,
        _option("--subject-column", text="Column of subjects, held out whole.", panel=_DATA),
    ] = None,
    image_size: Annotated[
        str | None,
        _option("--image-size", text="Scale images to this side.", panel=_DATA, metavar="PIXELS"),
    ] = None,
    max_per_class: Annotated[
        str | None, _option("--max-per-class", text="Use fewer samples.", panel=_DATA, metavar="N")
    ] = None,
    model: Annotated[
        str | None,
        _option(
            "--model",
            text="mlp, cnn, vit, efficientnet-lite0, minilm or hf:NAME; by default a small one that "
            "suits the data.",
            panel=_TRAIN,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        _option("--methods", text="Names with commas; a+b combines two.", panel=_TRAIN),
    ] = None,
    option: Annotated[
        list[str] | None,
        _option(
            "--option", text="METHOD.OPTION=VALUE, as often as needed; see methods.", panel=_TRAIN
        ),
    ] = None,
    epochs: Annotated[
        str | None, _option("--epochs", text="Passes over each task.", panel=_TRAIN, metavar="N")
    ] = None,
    batch_size: Annotated[
        str | None, _option("--batch-size", text="Samples a step.", panel=_TRAIN, metavar="N")
    ] = None,
    lr: Annotated[
        str | None, _option("--lr", text="Learning rate.", panel=_TRAIN, metavar="RATE")
    ] = None,
    optimizer: Annotated[
        str | None, _option("--optimizer", text="sgd, adam or adamw.", panel=_TRAIN)
    ] = None,
    loss: Annotated[
        str | None,
        _option(
            "--loss",
            text="masked to the task's classes (default), softmax over all classes so far, or sigmoid.",
            panel=_TRAIN,
        ),
    ] = None,
    seed: Annotated[
        str | None, _option("--seed", text="Of the whole comparison.", panel=_RUN, metavar="N")
    ] = None,
    seeds: Annotated[
        str | None, _option("--seeds", text="Repetitions.", panel=_RUN, metavar="N")
    ] = None,
    workers: Annotated[
        str | None,
        _option(
            "--workers", text="Processes; by default one a core; 0: none.", panel=_RUN, metavar="N"
        ),
    ] = None,
    on: Annotated[
        str | None,
        _option(
            "--on",
            text="Where trials run: local, ray (one is started here, or $RAY_ADDRESS), ray://auto or "
            "ray://HOST:PORT.",
            panel=_RUN,
        ),
    ] = None,
    resources: Annotated[
        str | None,
        _option(
            "--resources",
            text="What a trial asks of Ray, as JSON: '{\"GPU\": 1}'.",
            panel=_RUN,
            metavar="JSON",
        ),
    ] = None,
    threads: Annotated[
        str | None, _option("--threads", text="Threads of each trial.", panel=_RUN, metavar="N")
    ] = None,
    out: Annotated[
        Path | None, _option("--out", text="The run's folder; by default new in runs/.", panel=_RUN)
    ] = None,
    track: Annotated[
        list[str] | None,
        _option(
            "--track",
            text="mlflow, tensorboard, trackio, or package.module:Class; several with commas.",
            panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        bool, _option("--resume", text="Go on with the run in --out.", panel=_RUN)
    ] = False,
    as_json: Annotated[
        bool, _option("--json", text="Print one JSON document instead of a table.", panel=_RUN)
    ] = False,
) -> None:
    flags = {
        "stream": {
            "data": data,
            "scenario": scenario,
            "tasks": tasks,
            "image_column": image_column,
            "text_column": text_column,
            "label_column": label_column,
            "domain_column": domain_column,
            "subject_column": subject_column,
            "image_size": image_size,
            "max_per_class": max_per_class,
        },
        "model": model,
        "methods": methods,
        "options": settings.options(option or []),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": optimizer,
        "loss": loss,
        "seed": seed,
        "seeds": seeds,
        "workers": workers,
        "on": on,
        "ray": settings.resources(resources),
        "threads": threads,
        "out": None if out is None else str(out),
        "track": track or None,
    }
    raise typer.Exit(_run(config, flags, resume, as_json))


def _run(file: Path | None, flags: dict[str, Any], resume: bool, as_json: bool) -> int:
    from guywire.lab import tracking, training

    config = settings.settle(file, flags, resume=resume)
    folder: Path | None = None
    with Display() as display, tracking.Follower(config.track, display.remark) as follower:

        def begun(path: Path, resolved: training.CompareConfig, stream: Any) -> None:
            nonlocal folder
            folder = path
            total = len(resolved.methods) * len(resolved.seed_list) + sweeps.count(resolved)
            already = sum(
                1 for part in ("trials", "sweep") for _ in path.glob(f"{part}/*/result.json")
            )
            display.begin(path, total, already)
            follower.begin(path, resolved)

        def done(outcome: training.Outcome) -> None:
            result = outcome.result
            accuracy = None if result is None else result["metrics"]["accuracy"]
            display.done(outcome.spec.id, outcome.error, accuracy)
            if outcome.spec.sweep is None:
                follower.trial(outcome)

        try:
            found = training.compare(
                config,
                resume=resume,
                command=["guywire", *sys.argv[1:]],
                begun=begun,
                done=done,
                tick=display.tick,
            )
        except KeyboardInterrupt:
            follower.end("interrupted")
            where = "" if folder is None else _resume_command(folder)
            with contextlib.suppress(OSError):  # the terminal may be gone
                sys.stderr.write(f"\nguywire: interrupted{where}\n")
            return 130
        report = _report(found.folder)
        follower.end("failed" if found.failed else "done", found.table, found.failed)
    if as_json:
        console.print_json(
            {
                "results": found.table,
                "run": str(found.folder),
                "report": None if report is None else str(report),
                "failed": found.failed,
                **({} if found.sweep is None else {"sweep": found.sweep}),
            }
        )
    elif found.table:
        _print(found, report)
    if found.failed:
        first = next(iter(found.failed.values()))
        total = len(found.config.methods) * len(found.config.seed_list)
        return console.fail(f"{len(found.failed)} of {total} trials failed, the first: {first}", 1)
    return 0


def _report(folder: Path) -> Path | None:
    try:
        from guywire.lab.report import render
    except ImportError:
        return None
    try:
        return render(folder)
    except MissingExtraError as error:
        console.log().print(f"no report: {error}", markup=False)
    except GuywireError as error:
        console.log().print(f"the report failed ({error}); the results are whole", markup=False)
    return None


def _resume_command(folder: Path) -> str:
    return f"; go on with: guywire compare --resume --out {shlex.quote(str(folder))}"


def _print(found: Any, report: Path | None) -> None:
    config = found.config
    seeds = len(config.seed_list)
    if seeds == 1:
        how = "1 seed, no interval"
    else:
        how = f"mean [95% interval] over {seeds} seeds"
    screen = console.out()
    title = f"{config.stream.data}, {config.stream.scenario}-incremental, {config.model}: {how}"
    screen.print(results_table(found.table, escape(title)))
    if found.sweep is not None:
        sweeps.show(screen, found.sweep)
    screen.print(f"run     {found.folder}", markup=False)
    if report is not None:
        screen.print(f"report  {report}", markup=False)
