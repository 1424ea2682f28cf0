"""What a trial measures, and how it is written down."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guywire.core.errors import DataError, need
from guywire.diagnostics import ContinualMonitor
from guywire.lab.streams import Split, Stream
from guywire.lab.training import evaluate
from guywire.lab.training.config import TrialSpec

__all__ = [
    "Position",
    "Record",
    "bytes_in",
    "check_data",
    "finished",
    "result_of",
    "split_bytes",
    "weights_hash",
]

_MB = 1e6


@dataclass
class Position:
    """Where a trial stands.

    Attributes:
        task: being trained; the number of tasks when all are done.
        epoch: within the task.
        batch: batches done within the epoch.
        step: optimiser steps done in all.
    """

    task: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass
class Record:
    """What a trial has measured so far.

    Attributes:
        losses: of every step.
        loss_tasks: the task of every step.
        matrix: accuracy by trained-through task and evaluated task.
        pooled: accuracy on all test data together after the last finished task.
        extra_memory: bytes that the method held, at most.
        seconds: spent on training and consolidating.
        evaluation_seconds: spent on looking.
    """

    losses: list[float] = field(default_factory=list)
    loss_tasks: list[int] = field(default_factory=list)
    matrix: list[list[float | None]] = field(default_factory=list)
    pooled: float = math.nan
    extra_memory: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def curves(self, monitor: ContinualMonitor | None) -> dict[str, list[Any]]:
        """Lay out the columns of ``metrics.parquet``.

        Args:
            monitor: holds the accuracies.

        Returns:
            ``step``, ``task``, ``evaluated`` (-1 for the loss), ``metric``, ``value``.
        """
        rows: list[tuple[int, int, int, str, float]] = [
            (i + 1, task, -1, "loss", value)
            for i, (task, value) in enumerate(zip(self.loss_tasks, self.losses, strict=True))
        ]
        if monitor is not None:
            rows += [
                (o.step, int(o.task), int(o.evaluated), "accuracy", o.value)
                for o in monitor.curves()
            ]
        names = ("step", "task", "evaluated", "metric", "value")
        columns = zip(*rows, strict=True) if rows else ([] for _ in names)
        return {name: list(column) for name, column in zip(names, columns, strict=True)}


def result_of(
    spec: TrialSpec,
    model: torch.nn.Module,
    stream: Stream,
    steps: int,
    record: Record,
    monitor: ContinualMonitor | None,
) -> dict[str, Any]:
    """Return the content of ``result.json``.

    Args:
        spec: the trial.
        model: as trained.
        stream: the tasks.
        steps: optimiser steps done.
        record: what was measured.
        monitor: what was looked at in between.

    Returns:
        Plain values; nothing but ``seconds`` and ``share`` depends on a clock.
    """
    memory = record.extra_memory / _MB
    metrics = evaluate.summary(record.matrix, record.pooled, stream, monitor)
    looked: dict[str, Any] = {"enabled": monitor is not None}
    if monitor is not None:
        cost = monitor.cost()
        total = record.seconds + record.evaluation_seconds
        looked |= {
            "evaluations": len({o.step for o in monitor.curves()}),
            "mean_gap": cost["mean_gap"],
            "max_gap": cost["max_gap"],
            "subset": [min(spec.evaluation.subset, len(t.test)) for t in stream.tasks],
            "seconds": record.evaluation_seconds,
            "share": record.evaluation_seconds / total if total > 0 else 0.0,
        }
    return {
        "method": spec.method,
        "seed": spec.seed,
        "accuracy_matrix": record.matrix,
        "metrics": metrics | {"seconds": record.seconds, "extra_memory_mb": memory},
        "seconds": record.seconds,
        "extra_memory_mb": memory,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": weights_hash(model),
        "evaluation": looked,
    }


def finished(directory: Path) -> dict[str, Any] | None:
    """Read what a finished trial left.

    Args:
        directory: of the trial.

    Returns:
        The content of ``result.json``; ``None`` if the trial has not finished, or if that file or
        ``metrics.parquet`` is gone or damaged: its state has all that they are made of.
    """
    parquet = need("pyarrow.parquet", extra="cli")
    try:
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        parquet.read_table(directory / "metrics.parquet")
    except (OSError, ValueError, RecursionError):  # those of pyarrow are of either kind
        return None
    whole = (
        isinstance(result, dict)
        and isinstance(result.get("method"), str)
        and type(result.get("seed")) is int
        and isinstance(metrics := result.get("metrics"), dict)
        and all(map(_number, metrics.values()))
        and isinstance(matrix := result.get("accuracy_matrix"), list)
        and all(isinstance(row, list) and all(map(_number, row)) for row in matrix)
    )
    return result if whole else None


def _number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)


def check_data(stream: Stream) -> None:
    """Refuse tasks without samples, and labels that their task does not have.

    Args:
        stream: the tasks.

    Raises:
        DataError: the first that is wrong.
    """
    for index, task in enumerate(stream.tasks):
        for part, split in (("train", task.train), ("test", task.test)):
            if len(split) == 0:
                raise DataError(
                    f"task {index} ({task.name!r}) has no {part} samples: use fewer tasks, "
                    "more samples a class, or another data set"
                )
            strange = set(split.labels.unique().tolist()) - set(task.classes)
            if strange:
                raise DataError(
                    f"task {index} ({task.name!r}) has {part} labels {sorted(strange)}, which lie "
                    f"outside its classes {list(task.classes)}: correct the labels"
                )


def weights_hash(model: torch.nn.Module) -> str:
    """Return a hash of every parameter and buffer of a model, bit for bit.

    Args:
        model: any module.

    Returns:
        SHA-256 in hex.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def bytes_in(tree: Any, seen: set[tuple[Any, ...]] | None = None) -> int:
    """Count the bytes of the tensors in a tree, shared ones once.

    Args:
        tree: dicts, lists and tensors, nested.
        seen: tensors that count no more.

    Returns:
        The bytes.
    """
    seen = set() if seen is None else seen
    if isinstance(tree, Tensor):
        key = (tree.data_ptr(), tree.numel(), tree.dtype)
        if key in seen:
            return 0
        seen.add(key)
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(bytes_in(v, seen) for v in tree.values())
    if isinstance(tree, list | tuple):
        return sum(bytes_in(v, seen) for v in tree)
    return 0


def split_bytes(split: Split) -> int:
    """Return how many bytes the inputs of a split take.

    Args:
        split: of images, tokens or texts.

    Returns:
        The bytes.
    """
    if isinstance(split.inputs, Tensor):
        return split.inputs.numel() * split.inputs.element_size()
    return sum(len(text.encode()) for text in split.inputs)
