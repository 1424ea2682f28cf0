"""The loop of all three parts: task after task, with whatever holds the parameters attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core import batches, losses
from guywire.core.aside import undisturbed
from guywire.core.losses import masked_cross_entropy, sigmoid_cross_entropy
from guywire.lab.models import Classifier
from guywire.lab.streams import Batch, Split, Stream, Task
from guywire.lab.studies.study import Work

__all__ = ["Loss", "Recipe", "learn", "linear_cka"]

Loss = Literal["masked", "softmax", "sigmoid", "sigmoid-new"]
"""``masked``: softmax over the new classes; ``softmax``: over all so far; ``sigmoid``: every class for
itself, old ones with target 0; ``sigmoid-new``: the same without the old ones, which prediction
distillation then covers."""

_BATCH = 64


class Recipe:
    """How one stream is learnt.

    Args:
        regularizers: what holds the model.
        loss: on new samples.
        epochs: over each task.
        batch_size: samples a step.
        rate: of the backbone, for Adam.
        head_rate: of the head.
        joint: all tasks at once, as a ceiling.
        anchored: anchors are taken before the first task, where the start is worth keeping.
        cosine: let the rates fall to 0 over each task.
    """

    def __init__(
        self,
        regularizers: Sequence[gw.Regularizer] = (),
        *,
        loss: Loss,
        epochs: int,
        batch_size: int,
        rate: float,
        head_rate: float,
        joint: bool = False,
        anchored: bool = True,
        cosine: bool = False,
    ) -> None:
        self.regularizers = list(regularizers)
        self.loss: Loss = loss
        self.epochs = epochs
        self.batch_size = batch_size
        self.rate = rate
        self.head_rate = head_rate
        self.joint = joint
        self.anchored = anchored
        self.cosine = cosine


def learn(
    work: Work,
    stream: Stream,
    model: Classifier,
    recipe: Recipe,
    *,
    tasks: int,
    part: Literal["valid", "test"],
) -> list[dict[str, Any]]:
    """Learn the first tasks of a stream and measure what is left of each.

    Args:
        work: gives generators and makes rows.
        stream: the stream.
        model: with an empty head; parameters that are not to move have ``requires_grad=False``.
        recipe: how.
        tasks: how many of the stream's tasks.
        part: on which data to measure.

    Returns:
        Rows: ``accuracy`` (of the final model on all classes), ``forgetting_global``,
        ``forgetting_local``, ``learning_accuracy`` (each task just learnt, the task given),
        ``moved`` (how far the trainable backbone went), ``cka`` (features of task 1, then and at
        the end), and the curve ``accuracy_so_far``.
    """
    shown = stream.tasks[:tasks]
    held_out = [_by_length(stream, getattr(task, part)) for task in shown]
    start = {n: p.detach().clone() for n, p in _moving(model.backbone).items()}
    growing, shuffling = work.generator("head"), work.generator("shuffle")
    rows: list[dict[str, Any]] = []
    open_accuracy: list[list[float]] = []
    task_accuracy: list[list[float]] = []
    pooled, first_features = 0.0, torch.empty(0)
    for index, task in enumerate([_all_of(shown)] if recipe.joint else shown):
        _anchor(model, recipe, index)
        model.grow(len(task.classes), growing)
        _train(model, stream, task, recipe, index, shuffling, last=index == len(shown) - 1)
        seen = held_out if recipe.joint else held_out[: index + 1]
        logits = [_outputs(model, stream, split) for split in seen]
        groups = [shown[i].classes for i in range(len(seen))]
        open_accuracy.append([_accuracy(z, s.labels) for z, s in zip(logits, seen, strict=True)])
        task_accuracy.append(
            [
                _accuracy(z[:, list(g)], s.labels - g[0])
                for z, s, g in zip(logits, seen, groups, strict=True)
            ]
        )
        pooled = _accuracy(torch.cat(logits), torch.cat([s.labels for s in seen]))
        rows.append(work.row("accuracy_so_far", pooled, step=len(seen)))
        if index == 0:
            first_features = _outputs(model, stream, held_out[0], model.features)
    rows.append(work.row("accuracy", pooled))
    if not recipe.joint:
        rows += [
            work.row("forgetting_global", gw.diagnostics.global_forgetting(_ragged(open_accuracy))),
            work.row("forgetting_local", gw.diagnostics.local_forgetting(_ragged(task_accuracy))),
        ]
    rows.append(
        work.row("learning_accuracy", sum(row[-1] for row in task_accuracy) / len(task_accuracy))
    )
    squares = [
        (p.detach() - start[n]).square().sum()
        for n, p in model.backbone.named_parameters()
        if n in start
    ]
    rows.append(work.row("moved", float(torch.stack(squares).sum().sqrt()) if squares else 0.0))
    final_features = _outputs(model, stream, held_out[0], model.features)
    rows.append(work.row("cka", linear_cka(first_features, final_features)))
    return rows


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return the linear centred kernel alignment of two representations of the same samples.

    ``||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F)`` of column-centred features; 1 where they agree up to
    rotation and scale. Source: Kornblith et al., arXiv 1905.00414.

    Args:
        first: ``[samples, width]``.
        second: ``[samples, another width]``.

    Returns:
        A number in [0, 1].

    Example:
        >>> x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(x, 2 * x.roll(1, 1)), 6)
        1.0
    """
    x = first.double() - first.double().mean(0)
    y = second.double() - second.double().mean(0)
    shared = (y.T @ x).square().sum()
    own = (x.T @ x).square().sum().sqrt() * (y.T @ y).square().sum().sqrt()
    return float(shared / own) if own > 0 else 0.0


def _anchor(model: Classifier, recipe: Recipe, index: int) -> None:
    """Take the first anchors before the head has rows whose random start nobody wants to keep."""
    if recipe.regularizers and index == (0 if recipe.anchored else 1):
        params = [p for p in model.parameters() if p.requires_grad]
        with gw.attach(model, torch.optim.SGD(params, lr=0.0), _from(recipe, index)):
            pass


def _from(recipe: Recipe, index: int) -> list[gw.Regularizer]:
    """Leave L2 out of the first task where the start is random: there is nothing to stay near."""
    if recipe.anchored or index > 0:
        return recipe.regularizers
    return [r for r in recipe.regularizers if not isinstance(r, gw.L2)]


def _train(
    model: Classifier,
    stream: Stream,
    task: Task,
    recipe: Recipe,
    index: int,
    generator: torch.Generator,
    *,
    last: bool,
) -> None:
    head = list(model.head.parameters())
    body = list(_moving(model.backbone).values())
    groups = [{"params": head, "lr": recipe.head_rate}]
    if body:
        groups.append({"params": body, "lr": recipe.rate})
    optimizer = torch.optim.Adam(groups, fused=True)
    steps = recipe.epochs * -(-len(task.train) // recipe.batch_size)
    schedule = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if recipe.cosine else None
    )
    model.train()
    with gw.attach(model, optimizer, _from(recipe, index)) as wires:
        for _ in range(recipe.epochs):
            for batch in _batches(stream, task.train, recipe.batch_size, generator):
                outputs = batches.forward(model, batch)
                loss = _loss(recipe.loss, outputs, batches.labels_of(batch), task.classes)
                loss = loss + wires.loss(batch, outputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
        if not (last or recipe.joint):
            wires.consolidate(stream.loader(_by_length(stream, task.train), 32))


def _loss(kind: Loss, logits: Tensor, labels: Tensor, new: Sequence[int]) -> Tensor:
    if kind == "masked":
        return masked_cross_entropy(logits, labels, new)
    if kind == "softmax":
        return losses.cross_entropy(logits, labels)
    return sigmoid_cross_entropy(logits, labels, new if kind == "sigmoid-new" else None)


def _batches(
    stream: Stream, split: Split, size: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Shuffle, keeping texts of about the same length together: padding costs as much as words."""
    if stream.kind != "text" or not isinstance(split.inputs, Tensor):
        yield from stream.batches(split, size, generator)
        return
    lengths = (split.inputs != stream.pad_id).sum(1)
    order = (lengths + 1.0 * torch.rand(len(split), generator=generator)).argsort().split(size)
    for i in torch.randperm(len(order), generator=generator).tolist():
        yield from stream.batches(split.subset(order[i]), size)


def _by_length(stream: Stream, split: Split) -> Split:
    """Sort texts by their length where their order does not matter, for the same reason."""
    if stream.kind != "text" or not isinstance(split.inputs, Tensor):
        return split
    return split.subset((split.inputs != stream.pad_id).sum(1).argsort(stable=True))


def _all_of(tasks: Sequence[Task]) -> Task:
    first, *rest = (task.train for task in tasks)
    return Task(
        name="all",
        classes=tuple(c for task in tasks for c in task.classes),
        train=first.concat(rest),
        valid=tasks[0].valid,
        test=tasks[0].test,
    )


def _moving(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def _outputs(
    model: Classifier, stream: Stream, split: Split, call: Callable[..., Tensor] | None = None
) -> Tensor:
    with undisturbed(model, mode=False), torch.no_grad():
        return torch.cat(
            [batches.forward(call or model, b) for b in stream.loader(split, _BATCH)]  # pyright: ignore[reportArgumentType]
        )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


def _ragged(rows: list[list[float]]) -> list[list[float | None]]:
    return [[*row, *[None] * (len(rows) - len(row))] for row in rows]
