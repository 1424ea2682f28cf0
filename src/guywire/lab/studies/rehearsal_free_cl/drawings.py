"""Part C: a small vision transformer on drawings of classes that its pretraining never saw."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guywire.core.checkpoint import load, save
from guywire.core.errors import need
from guywire.lab import models, streams
from guywire.lab.models import Classifier
from guywire.lab.models.huggingface import Encoder
from guywire.lab.models.seeding import seeded
from guywire.lab.streams import Split, Stream, Task
from guywire.lab.studies.rehearsal_free_cl.arms import move_only, regularizers
from guywire.lab.studies.rehearsal_free_cl.loop import Recipe, learn
from guywire.lab.studies.study import Work

__all__ = ["learn_drawings", "pretrain_drawings"]

_START = "drawings-start.safetensors"
_STYLES = 4
_WIDTH, _LAYERS, _HEADS, _PATCH = 128, 4, 4, 16


def learn_drawings(
    work: Work, *, arm: str, move: str = "attention", strength: float = 1.0, tune: bool = False
) -> list[dict[str, Any]]:
    """Learn subgroups of emoji from their drawings, a few at a time.

    Args:
        work: of the study.
        arm: as in ``arms``.
        move: what of the backbone may move, and is held: ``attention`` or ``all``.
        strength: of its term.
        tune: the first tasks of a stream in another order of classes, measured on validation data.

    Returns:
        Rows, as ``loop.learn`` makes them.
    """
    s = work.settings
    start = _start(work.folder / _START)
    stream = _stream(start, s["c_tasks"], work.generator("class order"), tune=tune)
    model = _vit(stream, work.generator("network"))
    model.backbone.load_state_dict(start["weights"])
    held = models.attention_glob("vit") if move == "attention" else ["backbone.*"]
    move_only(model, [] if arm == "frozen" else held)
    recipe = Recipe(
        regularizers(arm, strength, held=held, memory=s["c_memory"], head="softmax"),
        loss="softmax" if arm in ("joint", "Replay") else "masked",
        epochs=s["c_epochs"],
        batch_size=s["c_batch"],
        rate=s["c_rate"],
        head_rate=s["c_head_rate"],
        joint=arm == "joint",
        cosine=True,
    )
    tasks, part = (s["c_tuning_tasks"], "valid") if tune else (s["c_tasks"], "test")
    return learn(work, stream, model, recipe, tasks=tasks, part=part)


def pretrain_drawings(work: Work) -> list[dict[str, Any]]:
    """Train the transformer on the subgroups that the stream leaves out; leave weights and stream.

    Args:
        work: of the study.

    Returns:
        One row: the accuracy on held-out emoji of the pretraining's own subgroups.
    """
    s = work.settings
    everything = streams.load(
        streams.StreamConfig(
            data="renditions",
            tasks=1,
            class_order="given",
            max_per_class=s["c_per_class"] * _STYLES,
            min_per_class=3 * _STYLES,
            test_fraction=0.25,
            valid_fraction=0.25,
        )
    )
    (task,) = everything.tasks
    kept = _middle(task, s["c_classes"])
    others = [c for c in task.classes if c not in kept]
    train, test = _of(task.train.concat(task.valid), others), _of(task.test, others)
    model = _pretrained(work, everything, train, len(others))
    with torch.no_grad():
        batches = everything.batches(test, 256)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    parts = {name: _of(getattr(task, name), kept) for name in ("train", "valid", "test")}
    save(
        work.leaves(_START),
        {
            "weights": {k: v.detach() for k, v in model.backbone.state_dict().items()},
            "parts": {n: {"images": p.inputs, "labels": p.labels} for n, p in parts.items()},
            "names": [everything.class_names[c] for c in kept],
            "mean": everything.mean,
            "std": everything.std,
        },
    )
    return [work.row("pretraining_accuracy", right / len(test))]


def _pretrained(work: Work, stream: Stream, train: Split, classes: int) -> Classifier:
    s = work.settings
    model = _vit(stream, work.generator("network"))
    model.grow(classes, work.generator("head"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["c_pretraining_rate"], weight_decay=0.05)
    steps = s["c_pretraining_epochs"] * -(-len(train) // s["c_pretraining_batch"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=s["c_pretraining_rate"], total_steps=steps, pct_start=0.1
    )
    generator = work.generator("shuffle")
    for _ in range(s["c_pretraining_epochs"]):
        for batch in stream.batches(train, s["c_pretraining_batch"], generator):
            assert isinstance(batch, tuple)
            images, labels = batch
            logits = model(_shifted(images, generator))
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def _shifted(images: Tensor, generator: torch.Generator, most: int = 8) -> Tensor:
    """Mirror half of the images and shift each by some pixels; white comes in from the edges."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    padded = torch.nn.functional.pad(images, [most] * 4, mode="replicate")
    y, x = torch.randint(2 * most + 1, (2, count), generator=generator)
    rows = y.view(-1, 1) + torch.arange(height)
    columns = x.view(-1, 1) + torch.arange(width)
    one = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[one, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _middle(task: Task, count: int) -> list[int]:
    """Choose the stream's classes: neither the largest nor the smallest, which pretraining gets."""
    everything = torch.cat([task.train.labels, task.valid.labels, task.test.labels])
    sizes = torch.bincount(everything, minlength=len(task.classes))
    by_size = sizes.argsort(descending=True, stable=True).tolist()
    first = (len(by_size) - count) // 3
    return sorted(by_size[first : first + count])


def _of(split: Split, classes: list[int]) -> Split:
    """Keep some classes, numbered in their order here."""
    numbers = torch.full((int(split.labels.max()) + 1,), -1)
    inside = [c for c in classes if c < len(numbers)]
    numbers[inside] = torch.arange(len(inside))
    at = (numbers[split.labels] >= 0).nonzero().squeeze(1)
    chosen = split.subset(at)
    return Split(chosen.inputs, numbers[chosen.labels])


def _stream(start: dict[str, Any], tasks: int, order: torch.Generator, *, tune: bool) -> Stream:
    """Cut the left-out classes into tasks, in an order of this seed."""
    count = len(start["names"])
    shuffled = torch.randperm(count, generator=order)
    numbers = torch.empty_like(shuffled)
    numbers[shuffled] = torch.arange(count)
    parts = {
        name: Split(part["images"], numbers[part["labels"]])
        for name, part in start["parts"].items()
    }
    if not tune:  # what strengths were chosen on is for training, once they are
        parts["train"] = parts["train"].concat(parts["valid"])
    cut = []
    for index, classes in enumerate(torch.arange(count).chunk(tasks)):
        inside = {
            name: part.subset(torch.isin(part.labels, classes).nonzero().squeeze(1))
            for name, part in parts.items()
        }
        cut.append(Task(f"task {index + 1}", tuple(classes.tolist()), **inside))
    return Stream(
        name="renditions",
        scenario="class",
        kind="image",
        tasks=tuple(cut),
        class_names=tuple(start["names"][i] for i in shuffled.tolist()),
        mean=start["mean"],
        std=start["std"],
    )


@lru_cache(maxsize=1)
def _start(path: Path) -> dict[str, Any]:
    return load(path)  # pyright: ignore[reportReturnType]


def _vit(stream: Stream, generator: torch.Generator) -> Classifier:
    """Return a vision transformer of 0.6M weights: the lab's own is four times as large."""
    transformers = need("transformers", extra="hf")
    channels, height, _ = stream.shape
    config = transformers.ViTConfig(
        image_size=height,
        patch_size=_PATCH,
        num_channels=channels,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=3 * _WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with seeded(generator):
        model = transformers.ViTModel(config, add_pooling_layer=False)
    return Classifier(Encoder(model, "image", _WIDTH), _WIDTH)
