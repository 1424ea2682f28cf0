"""How far an edit moves a model's output: scores that need no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.aside import undisturbed
from guywire.core.errors import UsageError

__all__ = ["Score", "output_change", "top_logits_change"]

Score = Callable[[nn.Module], float]
"""From an edited model to a number, lower is better."""


def output_change(
    model: nn.Module,
    data: Iterable[Any],
    *,
    read: Callable[[Any], Tensor] | None = None,
) -> Score:
    """Return a score: the mean absolute change of a model's output. Needs no labels.

    Args:
        model: fine-tuned, as it is now.
        data: batches; 50 sequences are what the paper uses.
        read: takes the output to compare; the last hidden state where there is one, else the logits.

    Returns:
        A function from an edited model to the change.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> score = output_change(layer, [(torch.ones(4, 2), None)])
        >>> score(layer)
        0.0
    """
    read = _hidden if read is None else read
    kept, wanted = _outputs_of(model, data, read)

    def score(edited: nn.Module) -> float:
        total, count = 0.0, 0
        for batch, reference in zip(kept, wanted, strict=True):
            change = read(batches.forward(edited, batch)).detach() - reference
            total += float(change.abs().sum(dtype=torch.float64))
            count += change.numel()
        return total / count

    return score


def top_logits_change(model: nn.Module, data: Iterable[Any], *, top: int = 5) -> Score:
    """Return a score: the mean squared change of a language model's largest logits.

    Args:
        model: fine-tuned, as it is now.
        data: batches.
        top: how many of the fine-tuned model's largest logits at each position count.

    Returns:
        A function from an edited model to the change.
    """
    kept, logits = _outputs_of(model, data, batches.logits_of)
    wanted = [z.topk(top, dim=-1) for z in logits]

    def score(edited: nn.Module) -> float:
        total, count = 0.0, 0
        for batch, reference in zip(kept, wanted, strict=True):
            z = batches.logits_of(batches.forward(edited, batch)).detach()
            change = z.gather(-1, reference.indices) - reference.values
            total += float(change.square().sum(dtype=torch.float64))
            count += change.numel()
        return total / count

    return score


def _outputs_of(
    model: nn.Module, data: Iterable[Any], read: Callable[[Any], Tensor]
) -> tuple[list[Any], list[Tensor]]:
    device = batches.device_of(model)
    kept = [batches.to(batch, device) for batch in data]
    if not kept:
        raise UsageError("there is no data to compare outputs on: give at least one batch")
    with undisturbed(model, mode=False), torch.no_grad():
        return kept, [read(batches.forward(model, batch)).detach() for batch in kept]


def _hidden(outputs: Any) -> Tensor:
    found = getattr(outputs, "last_hidden_state", None)
    return found if isinstance(found, Tensor) else batches.logits_of(outputs)
