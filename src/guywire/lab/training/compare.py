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
from guywire.lab.training import adapters, arms, optimizers, results
from guywire.lab.training.config import CompareConfig
from guywire.lab.training.criterion import Criterion
from guywire.lab.training.grid import Outcome, default_workers, run_grid
from guywire.lab.training.run import RunFolder, default_folder, now

__all__ = ["Comparison", "compare", "resolve"]


@dataclass
class Comparison:
    """What a comparison came to.

    Attributes:
        folder: the run's folder.
        config: as resolved.
        table: one dict a method, see :func:`guywire.lab.training.results.aggregate`.
        failed: trial ids to why they failed.
    """

    folder: Path
    config: CompareConfig
    table: list[dict[str, Any]]
    failed: dict[str, str]


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
    source = config.stream
    if "seed" not in source.model_fields_set:
        source = source.model_copy(update={"seed": config.seed})
    stream = streams.load(source)
    model = config.model or _usual_model(stream)
    stream = models.prepare(model, stream)
    changes = {"stream": source, "model": model, **optimizers.defaults(config, model)}
    config = config.model_copy(update=changes)
    _rehearse(config, stream)
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
    run = RunFolder(Path(config.out) if config.out else default_folder(config))
    going_on = run.prepare(config, resume=resume)
    with run.locked():
        run.started(command)
        if not going_on:
            run.describe(config, stream)
        specs = config.trials()
        workers = config.workers
        if workers is None:
            workers = default_workers(len(specs), config.threads)
        if begun is not None:
            begun(run.path, config, stream)
        try:
            outcomes = run_grid(
                specs, run.trials, workers=workers, resume=going_on, done=done, tick=tick
            )
        except KeyboardInterrupt:
            run.note(status="interrupted", finished=now())
            raise
        finished = [o.result for o in outcomes if o.result is not None]
        failed = {o.spec.id: o.error for o in outcomes if o.error is not None}
        results.write(run.results, finished)
        run.note(status="failed" if failed else "done", finished=now(), failed=failed)
    return Comparison(run.path, config, results.aggregate(finished), failed)


def _usual_model(stream: Stream) -> str:
    if stream.kind == "text":
        return "minilm"
    return "mlp" if max(stream.shape[1:]) <= 28 else "cnn"


def _rehearse(config: CompareConfig, stream: Stream) -> None:
    """Attach every method once to a fresh model, so that what cannot work fails now, by name."""
    model = _fresh(config, stream)
    criterion = Criterion(stream, config.loss)
    for spec in config.trials()[: len(config.methods)]:
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
