"""A comparison from settings to results: resolve, refuse, run the grid, put it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import guywire
from guywire.core.errors import UsageError
from guywire.lab import models, streams
from guywire.lab.streams import Stream
from guywire.lab.training import adapters, arms, optimizers, ray_grid, results
from guywire.lab.training.config import CompareConfig, TrialSpec
from guywire.lab.training.criterion import Criterion
from guywire.lab.training.grid import Outcome, default_workers, run_grid
from guywire.lab.training.run import RunFolder, default_folder, now
from guywire.lab.training.sweep import tune

__all__ = ["Comparison", "Runner", "compare", "resolve", "runner"]

Runner = Callable[[Sequence[TrialSpec], Path], list[Outcome]]
"""Runs trials, each in a folder of its own within the given one."""


@dataclass
class Comparison:
    """What a comparison came to.

    Attributes:
        folder: the run's folder.
        config: as resolved.
        table: one dict a method, see :func:`guywire.lab.training.results.aggregate`.
        failed: trial ids to why they failed.
        sweep: what was tuned before, the content of ``sweep.json``; ``None`` if nothing was.
    """

    folder: Path
    config: CompareConfig
    table: list[dict[str, Any]]
    failed: dict[str, str]
    sweep: dict[str, Any] | None = None


def resolve(config: CompareConfig) -> tuple[CompareConfig, Stream]:
    """Fill in what was left open, load the data, and refuse what cannot work.

    Args:
        config: as given.

    Returns:
        Settings without open ends (``out`` and ``workers`` excepted), and the stream, prepared
        for the model.

    Raises:
        UsageError: a method, model, option or selection makes no sense for these data.
        DataError: the data cannot be read.
    """
    arms.check(config)
    if config.sweep is not None:
        tune.check(config)
    source = config.stream
    if "seed" not in source.model_fields_set:
        source = source.model_copy(update={"seed": config.seed})
    stream = streams.load(source)
    model = config.model or _usual_model(stream)
    stream = models.prepare(model, stream)
    changes = {"stream": source, "model": model, **optimizers.defaults(config, model)}
    config = config.model_copy(update=changes)
    _rehearse(config, stream, config.trials()[: len(config.methods)])
    if config.sweep is not None:
        tune.check_data(stream)
        _rehearse(config, stream, tune.corners(config))
    return config, stream


def compare(
    config: CompareConfig,
    *,
    resume: bool = False,
    command: Sequence[str] = ("guywire", "compare"),
    begun: Callable[[Path, CompareConfig, Stream], None] | None = None,
    done: Callable[[Outcome], None] | None = None,
    tick: Callable[[], None] | None = None,
) -> Comparison:
    """Run every method with every seed, and write the run's folder (all but the report).

    Args:
        config: the settings.
        resume: go on with the run in ``config.out``.
        command: as typed, for ``run.json``.
        begun: called with the folder, the resolved settings and the data before the first trial.
        done: called with each trial's outcome.
        tick: called a few times a second.

    Returns:
        The table and what failed.

    Raises:
        GuywireError: nothing was run: words or data were wrong, or the folder cannot be used.
        KeyboardInterrupt: on Ctrl-C; the folder can be resumed.
    """
    config, stream = resolve(config)
    with ray_grid.joined(config):  # before a folder is made: there may be no such cluster
        return _carry_out(config, stream, resume, command, begun, done, tick)


def _carry_out(
    config: CompareConfig,
    stream: Stream,
    resume: bool,
    command: Sequence[str],
    begun: Callable[[Path, CompareConfig, Stream], None] | None,
    done: Callable[[Outcome], None] | None,
    tick: Callable[[], None] | None,
) -> Comparison:
    run = RunFolder(Path(config.out) if config.out else default_folder(config))
    run.prepare(config, resume=resume)
    with run.locked():
        going_on = run.prepare(config, resume=resume)  # another process may have been quicker
        with run.told():
            run.started(command, config)
            if begun is not None:
                begun(run.path, config, stream)  # from here on an interrupt can say where to go on
            run.describe(config, stream)
            trials = runner(config, resume=going_on, done=done, tick=tick)
            tuned = None if config.sweep is None else tune.tune(config, run, trials)
            chosen = None if tuned is None else tune.options_of(config, tuned)
            outcomes = trials(config.trials(chosen), run.trials)
            finished = [o.result for o in outcomes if o.result is not None]
            failed = {o.spec.id: o.error for o in outcomes if o.error is not None}
            results.write(run.results, finished)
            run.note(status="failed" if failed else "done", finished=now(), failed=failed)
    return Comparison(run.path, config, results.aggregate(finished), failed, tuned)


def runner(
    config: CompareConfig,
    *,
    resume: bool,
    done: Callable[[Outcome], None] | None = None,
    tick: Callable[[], None] | None = None,
) -> Runner:
    """Choose where trials run: the one place that decides it, for the sweep and the comparison.

    Args:
        config: the settings.
        resume: go on from states that are there.
        done: called with each trial's outcome.
        tick: called a few times a second.

    Returns:
        What runs trials in a folder and returns their outcomes, in order.
    """

    def run(specs: Sequence[TrialSpec], folder: Path) -> list[Outcome]:
        workers = config.workers
        with ray_grid.joined(config) as cluster:
            if cluster is not None:
                return ray_grid.run_grid(
                    specs,
                    folder,
                    cluster=cluster,
                    settings=config.ray,
                    workers=workers,
                    resume=resume,
                    done=done,
                    tick=tick,
                )
        if workers is None:
            workers = default_workers(len(specs), config.threads)
        return run_grid(specs, folder, workers=workers, resume=resume, done=done, tick=tick)

    return run


def _usual_model(stream: Stream) -> str:
    if stream.kind == "text":
        return "minilm"
    return "mlp" if max(stream.shape[1:]) <= 28 else "cnn"


def _rehearse(config: CompareConfig, stream: Stream, specs: Sequence[TrialSpec]) -> None:
    """Attach every method once to a fresh model, so that what cannot work fails now, by name."""
    model = _fresh(config, stream)
    criterion = Criterion(stream, config.loss)
    for spec in specs:
        arm = arms.build(spec, criterion)
        pretrained = optimizers.is_pretrained(spec.model)
        mine = _fresh(config, stream) if arm.lora is not None else model
        try:
            if arm.lora is not None:
                if not pretrained:
                    raise UsageError(
                        "it freezes the backbone and trains adapters of it, and this one has "
                        "random weights: use --model minilm or hf:NAME"
                    )
                adapters.inject(mine.backbone, torch.Generator().manual_seed(0), arm.lora)
            elif arm.frozen and pretrained:
                mine.backbone.requires_grad_(False)
            optimizer = optimizers.make(spec, mine)
            guywire.attach(mine, optimizer, arm.regularizers).detach()
        except guywire.GuywireError as error:
            raise UsageError(
                f"the method {spec.method!r} cannot be used with the model {spec.model!r} on "
                f"{stream.name!r}: {error}"
            ) from error
        finally:
            model.requires_grad_(True)


def _fresh(config: CompareConfig, stream: Stream) -> models.Classifier:
    model = models.build(config.model or "mlp", stream, torch.Generator().manual_seed(0))
    model.grow(len(stream.tasks[0].classes), torch.Generator().manual_seed(0))
    return model
