"""Accuracies at task ends, and the per-iteration monitor in between."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from guywire import diagnostics
from guywire.core import batches
from guywire.core.aside import undisturbed
from guywire.lab.models import Classifier
from guywire.lab.streams import Split, Stream
from guywire.lab.training.config import EvaluationConfig
from guywire.lab.training.seeding import seed_of

__all__ = ["accuracy", "matrix_row", "monitor", "on_validation", "summary", "task_given"]

Row = list[float | None]

# What the cost model of ``every: auto`` assumes of a core: it decides resolution, not results.
_FLOPS_PER_SECOND = 1e10
_CHEAP_SECONDS = 5.0
_BATCH = 512


def accuracy(
    model: nn.Module, stream: Stream, split: Split, classes: Sequence[int] | None = None
) -> tuple[int, int]:
    """Count right predictions on a split; modes, buffers and random states are left as they were.

    Args:
        model: returns logits over the classes so far.
        stream: makes the batches.
        split: the samples.
        classes: a prediction must be one of these; ``None`` for all.

    Returns:
        How many are right, and how many there are.
    """
    device = batches.device_of(model)
    allowed = None if classes is None else torch.tensor(classes, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    with undisturbed(model, mode=False), torch.no_grad():
        for batch in stream.loader(split, _BATCH):
            batch = batches.to(batch, device)
            logits = batches.logits_of(batches.forward(model, batch))
            right += (_predict(logits, allowed) == batches.labels_of(batch)).sum()
    return int(right), len(split)


def matrix_row(model: nn.Module, stream: Stream, trained: int) -> tuple[Row, float]:
    """Evaluate on every task's test data after a task.

    In the scenario ``class`` a prediction is one of all classes so far, in ``task`` one of the
    evaluated task's classes; both leave tasks to come out. In ``domain`` every task counts.

    Args:
        model: after the task.
        stream: the tasks.
        trained: the task it was trained through.

    Returns:
        One accuracy a task (``None`` where there is none), and that over all samples together.
    """
    row: Row = []
    right = total = 0
    for index, task in enumerate(stream.tasks):
        if stream.scenario != "domain" and index > trained:
            row.append(None)
            continue
        classes = task.classes if stream.scenario == "task" else None
        hits, size = accuracy(model, stream, task.test, classes)
        row.append(hits / size)
        right, total = right + hits, total + size
    return row, right / total


def on_validation(stream: Stream) -> Stream:
    """Return a stream without its test data: validation data stand in their place.

    Args:
        stream: any.

    Returns:
        A stream on which settings may be chosen; the given one is left as it is.
    """
    tasks = tuple(dataclasses.replace(task, test=task.valid) for task in stream.tasks)
    return dataclasses.replace(stream, tasks=tasks)


def monitor(
    model: nn.Module,
    stream: Stream,
    config: EvaluationConfig,
    *,
    steps: Sequence[int],
    batch_size: int,
    seed_parts: tuple[str | int, ...],
) -> diagnostics.ContinualMonitor | None:
    """Make the per-iteration monitor of a trial, on fixed parts of the test sets.

    Where the whole trial would spend only seconds on it, it looks at every step; else it keeps to
    a share of the training samples. Both follow from counting, so every machine looks alike.

    Args:
        model: to tell the cost of a forward pass.
        stream: the tasks; task ``i`` goes by the name ``str(i)``.
        config: the settings.
        steps: optimiser steps in each task.
        batch_size: samples a step.
        seed_parts: what seeds the choice of samples.

    Returns:
        The monitor, ``None`` if it is switched off.
    """
    if not config.enabled:
        return None
    sizes = [min(config.subset, len(task.test)) for task in stream.tasks]
    every: int | None = None if config.every == "auto" else config.every
    if every is None and _seconds(model, stream, sizes, steps) <= _CHEAP_SECONDS:
        every = 1
    shared: dict[str, Any] = {}
    if every is None:
        # The dense steps alone must not use up the share of the shortest task.
        worth = config.share * min(steps) * 3 * batch_size / max(1, sum(sizes))
        shared = {
            "budget": config.share,
            "train_batch_size": batch_size,
            "dense": min(config.dense, int(worth / 2)),
        }
    return diagnostics.ContinualMonitor(
        {str(i): stream.loader(task.test, _BATCH) for i, task in enumerate(stream.tasks)},
        every or 1,
        subset=config.subset,
        seed=seed_of(*seed_parts, "evaluation") % (1 << 31),
        classes={str(i): task.classes for i, task in enumerate(stream.tasks)}
        if stream.scenario == "task"
        else None,
        batch_size=_BATCH,
        **shared,
    )


@contextmanager
def task_given(model: Classifier, stream: Stream, task: int) -> Iterator[None]:
    """Within, logits outside the task's classes count as impossible, if the task is given.

    In the scenario ``task`` the model that is trained is p(y | x, task), and so is the one whose
    Fisher information is asked for.

    Args:
        model: the model.
        stream: the tasks.
        task: which.

    Yields:
        Nothing.
    """
    if stream.scenario != "task":
        yield
        return
    outside = torch.ones(model.classes, dtype=torch.bool)
    outside[list(stream.tasks[task].classes)] = False

    def hide(module: Any, inputs: Any, outputs: Tensor) -> Tensor | None:
        if module is not model:  # a teacher that was copied from it, hook and all
            return None
        # A finite number, for 0 * log 0 must be 0; its probability is exactly 0 all the same.
        return outputs.masked_fill(outside.to(outputs.device), -1e4)

    handle = model.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()


def summary(
    matrix: Sequence[Row],
    pooled: float,
    stream: Stream,
    watched: diagnostics.ContinualMonitor | None,
) -> dict[str, float | None]:
    """Return the summary metrics of a trial.

    Args:
        matrix: accuracy by trained-through task and evaluated task.
        pooled: accuracy of the final model on all test data.
        stream: the tasks.
        watched: the monitor after the last task.

    Returns:
        Names to numbers; ``None`` where undefined (forgetting of a single task).
    """
    sizes = None if stream.scenario == "domain" else [len(task.classes) for task in stream.tasks]
    found = {
        "accuracy": pooled,
        "average_accuracy": diagnostics.average_accuracy(matrix),
        "forgetting": diagnostics.forgetting(matrix),
        "backward_transfer": diagnostics.backward_transfer(matrix),
        "forgetting_global": diagnostics.global_forgetting(matrix, sizes),
        "learning_accuracy": diagnostics.learning_accuracy(matrix),
    }
    names = ("min_acc", "wc_acc", "wf10", "wp10", "wf100", "wp100")
    curves = {} if watched is None else watched.metrics()
    found |= {name: curves.get(name, math.nan) for name in names}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _predict(logits: Tensor, allowed: Tensor | None) -> Tensor:
    if allowed is None:
        return logits.argmax(-1)
    return allowed[logits[..., allowed].argmax(-1)]


def _seconds(model: nn.Module, stream: Stream, sizes: Sequence[int], steps: Sequence[int]) -> float:
    """Estimate what looking at every step would cost, from the operations of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    split = stream.tasks[0].test.subset([0])
    (batch,) = stream.loader(split, 1)
    batch = batches.to(batch, batches.device_of(model))
    counter = FlopCounterMode(display=False)
    with undisturbed(model, mode=False), torch.no_grad(), counter:
        batches.forward(model, batch)
    looked_at = sum(n * sum(sizes[: i + 1]) for i, n in enumerate(steps))
    return looked_at * counter.get_total_flops() / _FLOPS_PER_SECOND
