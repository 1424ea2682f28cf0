"""``guywire merge``: prune and merge fine-tuned checkpoints on disk."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from guywire.cli import console
from guywire.core.errors import UsageError

__all__ = ["register"]

_HELP = """
Prune the changes that fine-tuning made to a base model, and merge them into a new model.

BASE and each FINETUNED are folders as `save_pretrained` writes them (one safetensors file or shards),
safetensors files, or folders of PEFT LoRA adapters. Tensors are streamed in small pieces: memory does
not grow with the model. The result in `--out` loads with `from_pretrained`.

Examples:

- `guywire merge base/ tuned/ --rate 0.9 --out slim/` : drop 90% of the change at random, rescale the
rest (DARE)

- `guywire merge base/ law/ code/ --method dare-ties --weights 0.6,0.4 --out both/` : two models into
one

- `guywire merge base/ tuned/ --method darex-q --rate 0.99 --calibrate texts.txt --out slim/` : a q for
each layer, where 1 / (1 - rate) would be too much

- `guywire merge base/ adapter/ --method linear --out full/` : fold a LoRA adapter in

- `guywire merge base/ tuned/ --rate 0.99 --delta-only --out delta/` : a hundredth of the values, no
index

- `guywire merge base/ --apply delta/ --out slim/` : the same model again, bit for bit

- `guywire merge base/ tuned/ --out slim/ --resume` : go on with a merge that was killed

Methods: `linear` adds changes; `dare` and `darex-q` drop at random; `magnitude` keeps the largest,
`wanda` the largest after weighting with inputs; `ties` and `dare-ties` let models vote on signs.

What is pruned: every tensor that base and models share. A head that only the fine-tuned model has is
kept as it is, for there is nothing that it is a change of. `--exclude 'lm_head*'` merges a tensor
without pruning it.
"""

_MERGE, _RUN = "Merge", "Run"


def register(app: typer.Typer) -> None:
    """Add the command.

    Args:
        app: the application.
    """
    app.command("merge", help=_HELP)(_merge)


def _merge(
    models: Annotated[
        list[Path] | None, typer.Argument(metavar="BASE FINETUNED...", help="Folders or files.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to make.")] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="linear, dare, darex-q, dare-ties, ties, magnitude or wanda.",
            rich_help_panel=_MERGE,
        ),
    ] = "dare",
    rate: Annotated[
        str | None,
        typer.Option(
            "--rate",
            metavar="RATE",
            help="Share of each change that is dropped; by default 0.9, for ties, magnitude and wanda "
            "0.8.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W,...",
            help="One a model; by default their mean is added.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    scale: Annotated[
        str,
        typer.Option("--scale", metavar="X", help="Of the whole change.", rich_help_panel=_MERGE),
    ] = "1",
    q: Annotated[
        str | None,
        typer.Option(
            "--q",
            metavar="Q",
            help="For darex-q: what survivors are divided by, from 1 - rate (as dare) to 1; by default "
            "each layer's own.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="For wanda and darex-q: .txt (a text a line) or .jsonl (with text) for the models to "
            "read, or .safetensors with inputs by layer.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            "--select", metavar="GLOB", help="Prune these tensors only.", rich_help_panel=_MERGE
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude", metavar="GLOB", help="Do not prune these.", rich_help_panel=_MERGE
        ),
    ] = None,
    seed: Annotated[
        str, typer.Option("--seed", metavar="N", help="Of what survives.", rich_help_panel=_MERGE)
    ] = "0",
    delta_only: Annotated[
        bool,
        typer.Option("--delta-only", help="Write a compressed delta.", rich_help_panel=_MERGE),
    ] = False,
    apply: Annotated[
        Path | None,
        typer.Option(
            "--apply",
            metavar="DELTA",
            help="Restore the model of a compressed delta.",
            rich_help_panel=_MERGE,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="With --apply, instead of BASE.", rich_help_panel=_MERGE),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an earlier merge.", rich_help_panel=_RUN),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted merge.", rich_help_panel=_RUN),
    ] = False,
    threads: Annotated[
        str | None,
        typer.Option("--threads", metavar="N", help="By default one a core.", rich_help_panel=_RUN),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    from guywire.methods import merging

    names = [*([base] if base is not None else []), *(models or [])]
    if out is None:
        raise UsageError("say where the result goes: add --out FOLDER")
    if force and resume:
        raise UsageError("--force starts anew and --resume goes on: give one of them")
    how: dict[str, Any] = {"force": force, "resume": resume}
    how["threads"] = None if threads is None else _number("--threads", threads, int)
    begun = time.perf_counter()
    with _Bar() as bar:
        if apply is not None:
            if len(names) != 1:
                raise UsageError(
                    "--apply DELTA needs the base and nothing else: BASE or --base BASE"
                )
            result = merging.apply_delta(apply, names[0], out, progress=bar, **how)
        else:
            if len(names) < 2:
                raise UsageError("name the base and at least one fine-tuned model: BASE FINETUNED")
            result = merging.merge_checkpoints(
                names[0],
                names[1:],
                out,
                method=method,
                rate=None if rate is None else _number("--rate", rate, float),
                weights=None
                if weights is None
                else [_number("--weights", w, float) for w in weights.split(",")],
                scale=_number("--scale", scale, float),
                seed=_number("--seed", seed, int),
                q=None if q is None else _number("--q", q, float),
                inputs=None if calibrate is None else merging.calibration(calibrate),
                select=select or None,
                exclude=exclude or (),
                delta_only=delta_only,
                progress=bar,
                **how,
            )
    seconds = time.perf_counter() - begun
    if as_json:
        console.print_json(
            {
                "out": str(result.out),
                "recipe": result.recipe,
                "tensors": result.tensors,
                "bytes": result.size,
                "reused": result.reused,
                "seconds": seconds,
                "notes": result.notes,
            }
        )
        return
    _print(result, seconds, delta_only)


def _print(result: Any, seconds: float, delta_only: bool) -> None:
    log, screen = console.log(), console.out()
    for note in result.notes:
        log.print(note, markup=False, style="yellow")
    if result.reused:
        log.print(f"{result.reused} weights were there from before", markup=False)
    counts, recipe = result.tensors, result.recipe
    parts = [f"{counts['pruned']} tensors pruned"]
    parts += [f"{counts[key]} {key}" for key in ("merged", "kept", "unchanged") if counts[key]]
    how = f"{recipe['method']} at {recipe['rate']:g}" if recipe["rate"] else recipe["method"]
    if "q" in recipe:
        q = recipe["q"]
        how += f", q {q['mean']:.3g} ({q['chosen']}, {q['min']:.3g} to {q['max']:.3g})"
    what = "delta" if delta_only else "model"
    screen.print(f"{what} in {result.out}: {how}", markup=False)
    screen.print(f"{', '.join(parts)}; {result.size / 1e6:.1f} MB in {seconds:.1f} s", markup=False)


def _number(flag: str, text: str, kind: type) -> Any:
    try:
        return kind(text.strip())
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"{flag} {text!r}: write {what}") from None


class _Bar:
    """Weights done of all, on standard error: a bar for people, a few lines for log files."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._screen = console.log()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TaskProgressColumn(),
            Remaining(),
            console=self._screen,
            transient=True,
        )
        self._task = self._bar.add_task("reading headers", total=None)
        self._said = (0.0, "")

    def __enter__(self) -> _Bar:
        if self._screen.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._screen.is_terminal:
            self._bar.update(self._task, description=what, completed=done, total=total)
            return
        # A line for each stage, and every half a minute of a long one.
        now = time.monotonic()
        if what != self._said[1] or now - self._said[0] > 30.0:
            sys.stderr.write(f"{what}: {100 * done / max(1, total):.0f}%\n")
            self._said = (now, what)
