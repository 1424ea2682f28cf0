"""The classification losses of the loop, and what a prediction may choose among."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from guywire.core import batches, losses
from guywire.lab.streams import Stream

__all__ = ["Criterion", "per_task_mask"]

Loss = Literal["softmax", "masked", "sigmoid"]


def per_task_mask(groups: list[tuple[int, ...]], labels: Tensor, classes: int) -> Tensor:
    """Return for each sample which classes its own task has.

    Args:
        groups: the classes of each task.
        labels: class numbers, int64 ``[B]``.
        classes: number of logits.

    Returns:
        Booleans, ``[B, classes]``; a label outside every task allows nothing.

    Example:
        >>> per_task_mask([(0, 1), (2,)], torch.tensor([1, 2]), 3).int()
        tensor([[1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    table = torch.zeros(max(classes, 1 + max(map(max, groups))), classes, dtype=torch.bool)
    for group in groups:
        inside = [c for c in group if c < classes]
        table[torch.tensor(group).unsqueeze(1), torch.tensor(inside, dtype=torch.int64)] = True
    return table.to(labels.device)[labels]


class Criterion:
    """The loss of one batch for one scenario: callable ``(outputs, labels) -> 0-d tensor``.

    In the scenario ``task`` every sample's loss stays within the classes of its own task, whichever
    task is being trained; so does a replayed sample's.

    Args:
        stream: gives the scenario and each task's classes.
        loss: ``softmax``, ``masked`` or ``sigmoid``.
    """

    def __init__(self, stream: Stream, loss: Loss) -> None:
        self.groups = [task.classes for task in stream.tasks]
        self.scenario = stream.scenario
        self.loss = loss
        self.new_only = loss == "masked" and stream.scenario == "class"
        self.current: tuple[int, ...] = ()

    def suit(self, *, joint: bool, distilled: bool) -> None:
        """Adapt to the method.

        Args:
            joint: all data are there at once, so that ``masked`` would train no ceiling: it counts
                as ``softmax`` then.
            distilled: a sigmoid distillation covers the old classes, so that the classification
                loss covers the new ones only, if it is ``sigmoid`` too.
        """
        masked = self.loss == "masked" and not joint
        split = self.loss == "sigmoid" and distilled and not joint
        self.new_only = (masked or split) and self.scenario == "class"

    def begin(self, task: int) -> None:
        """Say which task is trained.

        Args:
            task: its index.
        """
        self.current = self.groups[task]

    def __call__(self, outputs: Any, labels: Any) -> Tensor:
        """Return the loss of samples of the current task.

        Args:
            outputs: of the model.
            labels: class numbers ``[B]``, or the batch they are in.

        Returns:
            A 0-d tensor.
        """
        logits, labels = _unpack(outputs, labels)
        if not self.new_only:
            return self.replayed(logits, labels)
        if self.loss == "sigmoid":
            return losses.sigmoid_cross_entropy(logits, labels, self.current)
        return losses.masked_cross_entropy(logits, labels, self.current)

    def replayed(self, outputs: Any, labels: Any) -> Tensor:
        """Return the loss of samples of any task seen so far: over all classes, or their task's.

        Args:
            outputs: of the model.
            labels: class numbers ``[B]``, or the batch they are in.

        Returns:
            A 0-d tensor.
        """
        logits, labels = _unpack(outputs, labels)
        if self.scenario != "task":
            if self.loss == "sigmoid":
                return losses.sigmoid_cross_entropy(logits, labels)
            return losses.cross_entropy(logits, labels)
        mask = per_task_mask(self.groups, labels, logits.shape[1])
        if self.loss == "sigmoid":
            targets = functional.one_hot(labels, logits.shape[1]).to(logits)
            terms = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            return (terms * mask).sum(1).mean()
        return losses.cross_entropy(logits.masked_fill(~mask, -torch.inf), labels)


def _unpack(outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    labels = labels if isinstance(labels, Tensor) else batches.labels_of(labels)
    return batches.logits_of(outputs), labels
