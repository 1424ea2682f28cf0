"""The streams of the study: digits and garments two classes at a time, drawings by style, turned digits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from guywire.lab import streams
from guywire.lab.streams import Split, Stream, Task

__all__ = ["SERIES", "series", "turned"]

SERIES: dict[str, dict[str, Any]] = {
    "digits": {"data": "mnist"},
    "garments": {"data": "fashion-mnist"},
    "digits by task": {"data": "mnist", "scenario": "task"},
    "styles": {"data": "renditions", "scenario": "domain"},
    "turned": {"data": "mnist", "tasks": 1},
}
"""Name to settings of ``StreamConfig``; classes keep their order 0..9 in all seeds, as in the paper."""


def series(
    name: str, settings: Mapping[str, Any], *, angle: float = 0.0, tune: bool = False
) -> Stream:
    """Return one of the streams.

    Args:
        name: among :data:`SERIES`.
        settings: of the study.
        angle: of ``turned``: degrees between one task and the next.
        tune: hold out a fifth of the training data for choosing a strength.

    Returns:
        The stream; its ``valid`` parts are empty unless ``tune``.
    """
    common = {"class_order": "given", "valid_fraction": 0.2 if tune else 0.0}
    wide = common | {
        "max_per_class": settings["train_per_class"] + settings["test_per_class"],
        "test_fraction": settings["test_per_class"]
        / (settings["train_per_class"] + settings["test_per_class"]),
    }
    if name == "styles":
        common |= {
            "classes": settings["style_classes"],
            "image_size": settings["style_side"],
            "test_fraction": 0.3,
        }
        return _load(tuple(sorted((SERIES[name] | common).items())))
    if name == "turned":
        whole = _load(tuple(sorted((SERIES[name] | wide).items())))
        return _turned_stream(whole, angle, settings["turned_tasks"])
    if name == "digits by task":
        wide["image_size"] = settings["task_side"]
    loaded = _load(tuple(sorted(({"tasks": 5} | SERIES[name] | wide).items())))
    return replace(loaded, tasks=loaded.tasks[: settings["tasks"]])


@lru_cache(maxsize=3)
def _load(items: tuple[tuple[str, Any], ...]) -> Stream:
    return streams.load(streams.StreamConfig(**dict(items)))


def _turned_stream(whole: Stream, angle: float, tasks: int) -> Stream:
    (task,) = whole.tasks
    made = [
        Task(
            name=f"{index * angle:g} degrees",
            classes=task.classes,
            train=turned(task.train, index * angle),
            valid=turned(task.valid, index * angle),
            test=turned(task.test, index * angle),
        )
        for index in range(tasks)
    ]
    return replace(whole, scenario="domain", tasks=tuple(made))


def turned(split: Split, degrees: float) -> Split:
    """Turn images about their centre, counterclockwise, bilinear, black outside.

    Args:
        split: of images, uint8 ``[N, C, H, W]``.
        degrees: the angle.

    Returns:
        A split of the same shape; the same one for 0 degrees.

    Example:
        >>> image = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
        >>> image[0, 0, 0, 1] = 200  # above the centre
        >>> turned(Split(image, torch.zeros(1, dtype=torch.long)), 90).inputs[0, 0, 1].tolist()
        [200, 0, 0]
    """
    if degrees == 0.0 or not len(split):
        return split
    assert isinstance(split.inputs, torch.Tensor)
    a = math.radians(degrees)
    # affine_grid maps places of the output to places of the input, so this is the inverse turn.
    back = torch.tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]])
    made = []
    for chunk in split.inputs.split(4096):
        grid = functional.affine_grid(
            back.expand(len(chunk), 2, 3), list(chunk.shape), align_corners=False
        )
        image = functional.grid_sample(chunk.float(), grid, align_corners=False)
        made.append(image.round().clamp(0, 255).to(torch.uint8))
    return Split(torch.cat(made), split.labels)
