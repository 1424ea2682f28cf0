"""From settings to a stream."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guywire.core.errors import UsageError
from guywire.lab.streams.config import StreamConfig
from guywire.lab.streams.splits import plan
from guywire.lab.streams.stream import Split, Stream, Task, in_turn
from guywire.lab.streams.tables import Table

__all__ = ["load"]

_NAMED = ("digits", "mnist", "fashion-mnist", "renditions")


def load(config: StreamConfig) -> Stream:
    """Read data and cut them into the tasks of a stream.

    Args:
        config: the settings.

    Returns:
        The stream, in memory.

    Raises:
        UsageError: the settings do not fit the data: too few classes, an unknown column or name.
        DataError: the data are missing or damaged; the message names the file.
        MissingExtraError: a package that the data need is not installed.

    Example:
        >>> stream = load(StreamConfig(data="digits", tasks=5))
        >>> [task.classes for task in stream.tasks]
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        >>> stream.shape
        (1, 8, 8)
    """
    table = _table(config)
    planned = plan(table, config)
    every = np.unique(np.concatenate([r for task in planned.tasks for r in task.rows]))
    inputs = table.fetch(every)
    labels = planned.numbers[table.labels]

    def split(rows: np.ndarray) -> Split:
        at = np.searchsorted(every, rows)
        chosen = torch.from_numpy(labels[rows])
        if isinstance(inputs, Tensor):
            return Split(inputs[torch.from_numpy(at)], chosen)
        return Split(tuple(inputs[i] for i in at), chosen)

    tasks = tuple(Task(t.name, t.classes, *(split(r) for r in t.rows)) for t in planned.tasks)
    mean, std = _moments(tasks[0].train.inputs)
    return Stream(
        name=table.name,
        scenario=config.scenario,
        kind=table.kind,
        tasks=tasks,
        class_names=planned.class_names,
        mean=mean,
        std=std,
        notes=(*table.notes, *planned.notes),
        samples=tuple(_samples(task.train) for task in tasks) if table.kind == "text" else (),
    )


def _table(config: StreamConfig) -> Table:
    name = config.data
    if name == "digits":
        from guywire.lab.streams.digits import digits

        return digits()
    raise _unknown(name)


def _unknown(name: str) -> UsageError:
    near = difflib.get_close_matches(name, _NAMED, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"name one of {', '.join(_NAMED)},"
    hint = hint if near else f"{hint} a path, or hf:NAME"
    return UsageError(f"there is no data set and no path {str(Path(name))!r}: {hint}")


def _moments(images: Tensor | tuple[str, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation of each channel, exact: from counts of the 256 values."""
    if not isinstance(images, Tensor):
        return None, None
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        count = torch.bincount(images[:, channel].reshape(-1), minlength=256).double()
        weight = count / count.sum()
        mean = (weight * values).sum()
        means.append(mean)
        stds.append((weight * (values - mean).square()).sum().sqrt())
    std = torch.stack(stds).float()
    # A channel without contrast stays as it is rather than be divided by zero.
    return torch.stack(means).float(), torch.where(std > 1e-6, std, torch.ones_like(std))


def _samples(split: Split) -> tuple[tuple[str, int], ...]:
    assert not isinstance(split.inputs, Tensor)
    at = in_turn(split.labels)[:8].tolist()
    return tuple((split.inputs[i], int(split.labels[i])) for i in at)
