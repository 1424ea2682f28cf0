"""The ways of holding parameters between the stages, and how hard each of them pulls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import guywire as gw

__all__ = [
    "ARMS",
    "FLOOR",
    "LAMBDA",
    "falling",
    "gradients",
    "hold",
    "pull_ratio",
    "squared_batch_gradients",
    "thaw",
]

LAMBDA, FLOOR = 0.9, 0.2

ARMS = {
    "scratch": {"arm": "scratch"},
    "plain": {"arm": "plain"},
    "plain, chosen rate": {"arm": "plain"},
    "L2": {"arm": "l2"},
    "Fisher, constant": {"arm": "constant"},
    "Fisher, decreasing": {"arm": "decreasing"},
    "layer unfreezing": {"arm": "unfreezing"},
    "printed code": {"arm": "printed"},
}
"""Condition to the arguments of its units, as :func:`hold` takes them."""


def falling(epoch: int, epochs: int) -> float:
    """Return lambda_e of the paper's code (as it was meant: the code never uses it).

    Args:
        epoch: e, epochs done.
        epochs: E, all epochs.

    Returns:
        The strength in this epoch.

    Example:
        >>> [round(falling(e, 20), 3) for e in (0, 5, 10, 15, 16, 20)]
        [0.9, 0.675, 0.45, 0.225, 0.2, 0.2]
    """
    return max(FLOOR, LAMBDA * (1.0 - epoch / epochs))


def hold(
    arm: str, scale: float, learnt: Mapping[str, Any], epochs: int, per_epoch: int
) -> tuple[list[gw.EWC | gw.L2], dict[str, Any] | None]:
    """Return the regularizers of an arm, and the state that stage A left for them.

    Args:
        arm: how the parameters are held.
        scale: of the pull.
        learnt: what stage A left.
        epochs: of stage B.
        per_epoch: steps an epoch.

    Returns:
        Regularizers to attach, and the state of the first.
    """
    # The library's quadratic has no 1/2, the paper's has.
    if arm == "l2":  # anchored where it is attached: at theta*
        return [gw.L2(strength=0.5 * scale * LAMBDA)], None
    if arm == "constant":
        return [gw.EWC(strength=0.5 * scale * LAMBDA)], learnt["ewc"]
    if arm == "decreasing":
        return [
            gw.EWC(strength=lambda step: 0.5 * scale * falling(step // per_epoch, epochs))
        ], learnt["ewc"]
    if arm == "printed":  # as released: 0.9 throughout, no 1/2, squared batch gradients, not scaled
        state = {"mean": learnt["model"], "precision": learnt["printed"], "tasks": 1}
        return [gw.EWC(strength=LAMBDA)], state
    return [], None


def squared_batch_gradients(
    model: nn.Module, loader: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what the released code calls the Fisher: squares of *batch-mean* gradients.

    For gradients of mean m and variance v a sample this is m^2 + v / B instead of m^2 + v: too small
    by up to the batch size. Here only to show what it does; Guywire does not offer it.

    Args:
        model: the model, left in the mode in which it came.
        loader: batches with labels.

    Returns:
        Names to the mean over batches.
    """
    training = model.training
    model.eval()
    params = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    batches = 0
    for batch in loader:
        gradients = torch.autograd.grad(
            model(**batch).loss, list(params.values()), allow_unused=True
        )
        for name, gradient in zip(params, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square()
        batches += 1
    model.train(training)
    return {name: value / max(batches, 1) for name, value in total.items()}


def thaw(model: Any, epoch: int, epochs: int) -> None:
    """Free the encoder's tensors from the input up: 10% at first, all after 80% of the epochs.

    Args:
        model: the encoder-decoder; decoder and shared embedding are always free.
        epoch: epochs done.
        epochs: all epochs.
    """
    shared = model.get_input_embeddings().weight
    tensors = [p for p in model.get_encoder().parameters() if p is not shared]
    share = min(1.0, 0.1 + 0.9 * epoch / max(1.0, 0.8 * epochs - 1.0))
    free = max(1, round(share * len(tensors)))
    for index, parameter in enumerate(tensors):
        parameter.requires_grad_(index < free)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients there are.

    Args:
        model: the model.

    Returns:
        Names to gradients.
    """
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def pull_ratio(task: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> float:
    """Return the norm of what the step hook added to the gradients, over that of the task's.

    Args:
        task: gradients before the optimiser's step.
        held: gradients after it: the hook has added the pull in place.

    Returns:
        The ratio.
    """
    pull = sum(float((held[n] - task[n] if n in task else held[n]).square().sum()) for n in held)
    norm = sum(float(gradient.square().sum()) for gradient in task.values())
    return (pull / max(norm, 1e-30)) ** 0.5
