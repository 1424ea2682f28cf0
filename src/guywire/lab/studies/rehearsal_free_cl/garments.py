"""Part B: a small network on garments, from scratch or from digits, with a head of sigmoids."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import losses
from guywire.core.checkpoint import load, save
from guywire.lab import streams
from guywire.lab.models import Classifier
from guywire.lab.models.seeding import seeded
from guywire.lab.streams import Stream
from guywire.lab.studies.rehearsal_free_cl.arms import regularizers
from guywire.lab.studies.rehearsal_free_cl.loop import Recipe, learn
from guywire.lab.studies.study import Work

__all__ = ["SmallCNN", "learn_garments", "pretrain_digits"]

_WEIGHTS = "digits-start.safetensors"
_TURNS = 4


class SmallCNN(nn.Module):
    """Three strided convolutions with GroupNorm: 92 thousand weights.

    Args:
        channels: of each stage.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        stages, inside = [], 1
        for outside in channels:
            conv = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
            stages += [conv, nn.GroupNorm(8, outside), nn.ReLU()]
            inside = outside
        self.stages = nn.Sequential(*stages)
        self.width = inside

    def forward(self, x: Tensor) -> Tensor:
        """Return features.

        Args:
            x: images, ``[B, 1, H, W]``.

        Returns:
            ``[B, width]``.
        """
        return self.stages(x).mean((2, 3))


def learn_garments(
    work: Work, *, arm: str, start: str, strength: float = 1.0, tune: bool = False
) -> list[dict[str, Any]]:
    """Learn kinds of garments, two at a time.

    Args:
        work: of the study.
        arm: as in ``arms``.
        start: ``random`` or ``pretrained``.
        strength: of its term.
        tune: the first tasks of a stream in another order of classes, measured on validation data.

    Returns:
        Rows, as ``loop.learn`` makes them.
    """
    s = work.settings
    stream = _stream(s["b_side"], s["b_per_class"], s["b_test_fraction"], work.seed, tune)
    with seeded(work.generator("network")):
        backbone = SmallCNN()
    model = Classifier(backbone, backbone.width)
    if start == "pretrained":
        weights = load(work.folder / _WEIGHTS)
        backbone.load_state_dict(weights)
    recipe = Recipe(
        regularizers(arm, strength, held=None, memory=s["b_memory"], head="sigmoid"),
        loss="sigmoid-new" if "PredKD" in arm else "sigmoid",
        epochs=s["b_epochs"],
        batch_size=s["b_batch"],
        rate=s["b_rate"],
        head_rate=s["b_rate"],
        joint=arm == "joint",
        anchored=start == "pretrained",
    )
    tasks, part = (s["b_tuning_tasks"], "valid") if tune else (s["b_tasks"], "test")
    return learn(work, stream, model, recipe, tasks=tasks, part=part)


def pretrain_digits(work: Work) -> list[dict[str, Any]]:
    """Train the network once on digits in four rotations, 40 classes, and leave its weights.

    Args:
        work: of the study.

    Returns:
        One row: the accuracy on test digits in their four rotations.
    """
    s = work.settings
    config = streams.StreamConfig(
        data="mnist", image_size=s["b_side"], tasks=1, valid_fraction=0.0, class_order="given"
    )
    stream = streams.load(config)
    (task,) = stream.tasks
    order = torch.randperm(len(task.train), generator=work.generator("digits"))
    train = task.train.subset(order[: s["b_pretraining_samples"]])
    with seeded(work.generator("network")):
        backbone = SmallCNN()
    model = Classifier(backbone, backbone.width)
    model.grow(10 * _TURNS, work.generator("head"))
    optimizer = torch.optim.Adam(model.parameters(), lr=s["b_pretraining_rate"])
    generator = work.generator("shuffle")
    for _ in range(s["b_pretraining_epochs"]):
        for batch in stream.batches(train, s["b_batch"], generator):
            images, labels = _turned(batch, generator)
            loss = losses.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = total = 0
    with torch.no_grad():
        for batch in stream.batches(task.test.subset(torch.arange(0, len(task.test), 5)), 500):
            images, labels = _turned(batch, generator)
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    save(work.leaves(_WEIGHTS), {k: v.detach() for k, v in backbone.state_dict().items()})
    return [work.row("pretraining_accuracy", right / total)]


def _turned(batch: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn a quarter of the images by each multiple of 90 degrees; a turned digit is a class."""
    images, labels = batch
    turns = torch.randint(_TURNS, (len(labels),), generator=generator)
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(_TURNS)])
    return turned[turns, torch.arange(len(labels))], labels + 10 * turns


@lru_cache(maxsize=2)
def _stream(side: int, per_class: int, test_fraction: float, seed: int, tune: bool) -> Stream:
    config = streams.StreamConfig(
        data="fashion-mnist",
        image_size=side,
        tasks=5,
        max_per_class=per_class,
        test_fraction=test_fraction,
        valid_fraction=0.25 if tune else 0.0,
        seed=seed,
    )
    return streams.load(config)
