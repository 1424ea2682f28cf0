"""Classification losses of class-incremental learning, as pure functions of logits.

Which loss the user's own term is matters more than the regulariser (arXiv 2203.17269): a softmax
over all classes pushes old classes down on every new sample; a *masked* ("local") softmax leaves
them alone; independent sigmoids make the push visible and give distillation something to replace.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core.batches import is_causal
from guywire.core.errors import DataError

__all__ = [
    "cross_entropy",
    "cross_entropy_of",
    "masked_cross_entropy",
    "only",
    "sigmoid_cross_entropy",
]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy over samples, or over the tokens whose label is not -100.

    Args:
        logits: ``[batch, classes]`` or ``[batch, ..., classes]``.
        labels: ``[batch]`` or ``[batch, ...]``.

    Returns:
        A 0-d tensor.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def cross_entropy_of(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy as a model means its labels.

    Args:
        model: the unwrapped model. Labels of a Hugging Face causal language model are its inputs,
            and its logits at a position predict the next one: they are shifted here.
        logits: ``[batch, ..., classes]``.
        labels: ``[batch, ...]``; -100 does not count.

    Returns:
        The mean over samples or tokens that count (0-d).

    Example:
        >>> cross_entropy_of(nn.Linear(1, 4), torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(1.3863)
    """
    if labels.dim() == 2 and logits.dim() == 3 and is_causal(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits, labels)


def only(logits: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
    """Return the logits with those of all other classes at minus infinity.

    Args:
        logits: ``[..., classes]``.
        classes: columns to keep.

    Returns:
        A tensor of the same shape; other columns get no gradient.

    Raises:
        DataError: a class lies outside the logits, or there are none.

    Example:
        >>> only(torch.tensor([[1.0, 2.0, 3.0]]), [0, 2])
        tensor([[1., -inf, 3.]])
    """
    columns = _columns(classes, logits)
    out = torch.full_like(logits, -torch.inf)
    return out.index_copy(-1, columns, logits.index_select(-1, columns))


def masked_cross_entropy(logits: Tensor, labels: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
    """Return the "local" cross entropy: a softmax over the given classes only.

    Old rows of a head get no gradient from it, so nothing needs to protect them. At test time the
    full head is used.

    Args:
        logits: ``[batch, all classes]``.
        labels: ``[batch]``, each in ``classes`` (or -100, which does not count).
        classes: those of the present task.

    Returns:
        The mean over the batch (0-d).

    Raises:
        DataError: a class lies outside the logits, or a label outside the classes.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0, 0.0]])
        >>> masked_cross_entropy(logits, torch.tensor([2]), [1, 2])
        tensor(0.6931)
    """
    columns = _columns(classes, logits)
    # -1 marks columns that are out, so that a label outside is told from a position.
    position = torch.full((logits.shape[-1],), -1, device=logits.device)
    position[columns] = torch.arange(len(columns), device=logits.device)
    counted = labels != -100
    inside = torch.where(counted, labels, columns[0])
    if bool(((inside < 0) | (inside >= len(position))).any()) or bool((position[inside] < 0).any()):
        bad = labels[counted & ~torch.isin(labels, columns)][0]
        raise DataError(
            f"the label {int(bad)} is not among the classes {columns.tolist()}: "
            "give all classes of the present task"
        )
    targets = torch.where(counted, position[inside], -100)
    return cross_entropy(logits.index_select(-1, columns), targets)


def sigmoid_cross_entropy(
    logits: Tensor, labels: Tensor, classes: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Return the binary cross entropy of independent classes: sum over classes, mean over the batch.

    With ``PredictionDistillation(kind="sigmoid")`` pass the present task's ``classes``: the targets
    of the old ones are then the teacher's (LwF.MC, arXiv 2203.17269). Without distillation leave
    ``classes`` out: the old ones' targets are then 0.

    Args:
        logits: ``[batch, all classes]``.
        labels: ``[batch]``.
        classes: columns that count; all if ``None``. A label outside them is a sample of none.

    Returns:
        A 0-d tensor.

    Raises:
        DataError: a class or a label lies outside the logits.

    Example:
        >>> sigmoid_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))
        tensor(2.0794)
    """
    if bool(((labels < 0) | (labels >= logits.shape[-1])).any()):
        bad = labels[(labels < 0) | (labels >= logits.shape[-1])][0]
        raise DataError(
            f"the label {int(bad)} lies outside the head of {logits.shape[-1]} classes: grow it first"
        )
    targets = F.one_hot(labels, logits.shape[-1]).to(logits)
    if classes is not None:
        columns = _columns(classes, logits)
        logits, targets = logits.index_select(-1, columns), targets.index_select(-1, columns)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1).mean()


def _columns(classes: Tensor | Sequence[int], logits: Tensor) -> Tensor:
    columns = torch.as_tensor(classes, dtype=torch.long, device=logits.device)
    if columns.numel() == 0:
        raise DataError("the list of classes is empty: name those of the present task")
    low, high = int(columns.min()), int(columns.max())
    if low < 0 or high >= logits.shape[-1]:
        bad = low if low < 0 else high
        raise DataError(f"the class {bad} lies outside the head of {logits.shape[-1]} classes")
    return columns
