"""Split a step's gradient into what learns the new and what keeps the old.

    L = alpha * L_plast + (1 - alpha) * L_stab

At a task switch the stability term of penalties and distillation has no gradient at all (the model
*is* the anchor, the student *is* the teacher) and replay's is small (memory is fitted already), so
the first updates are pure plasticity: that is why old tasks fall before they recover.

Norms are of the *unscaled* terms, in the mode in which the model is, and so comparable over methods.

Source: De Lange, van de Ven, Tuytelaars, arXiv 2205.13452, section on gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from guywire.core import selection, tensors
from guywire.core.aside import undisturbed
from guywire.core.tensors import Tensors

__all__ = ["GradientSplit", "gradient_split", "split_of"]


class GradientSplit(NamedTuple):
    """The two gradients in three numbers.

    Attributes:
        plasticity: ``||grad L_plast||_2`` over all selected parameters.
        stability: ``||grad L_stab||_2``.
        cosine: of the angle between them; NaN where one is zero.
    """

    plasticity: float
    stability: float
    cosine: float


def gradient_split(
    model: nn.Module,
    plasticity: Callable[[], Tensor],
    stability: Callable[[], Tensor | None],
    *,
    select: selection.Selection = None,
) -> GradientSplit:
    """Measure both gradients of the present model; its gradients and buffers stay as they are.

    Args:
        model: the module.
        plasticity: returns the loss on the present task's batch, with a graph.
        stability: returns the term that keeps the old, unscaled; ``None`` if there is none.
        select: over which parameters.

    Returns:
        Norms and cosine.

    Raises:
        SelectionError: the selection matches nothing.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> w = model.weight
        >>> gradient_split(model, lambda: 3 * w[0, 0] + 4 * w[0, 1], lambda: w[0, 0] * 2)
        GradientSplit(plasticity=5.0, stability=2.0, cosine=0.6)
    """
    params = selection.select(model, select)
    with undisturbed(selection.unwrap(model)), torch.enable_grad():
        return split_of(_gradient(plasticity(), params), _gradient(stability(), params))


def split_of(plasticity: Tensors, stability: Tensors) -> GradientSplit:
    """Return norms and cosine of two gradients, e.g. of one that a projection returned.

    Args:
        plasticity: names to gradients.
        stability: names to gradients; names that are missing count as zero.

    Returns:
        Norms and cosine; under FSDP2 over the local shards.
    """
    a, b = _norm(plasticity), _norm(stability)
    product = sum(
        float(torch.sum(tensors.local(g).double() * tensors.local(stability[n]).double()))
        for n, g in plasticity.items()
        if n in stability
    )
    return GradientSplit(a, b, product / (a * b) if a > 0 and b > 0 else math.nan)


def _norm(gradient: Tensors) -> float:
    return math.sqrt(
        sum(float(tensors.local(g).double().square().sum()) for g in gradient.values())
    )


def _gradient(loss: Tensor | None, params: dict[str, nn.Parameter]) -> Tensors:
    if loss is None or not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: g for n, g in zip(params, grads, strict=True) if g is not None}
