"""Linear mode connectivity: what lies between two sets of weights of one model.

    theta(s) = (1 - s) * start + s * end,        s = 0, ..., 1
    barrier  = max_s [ L(theta(s)) - ((1 - s) L(start) + s L(end)) ]

A barrier near zero says that the two lie in one valley. Where the start is a model after an old task
and the end the same after a new one, old-task accuracy often falls late along the path and new-task
accuracy rises early, so that a point inside beats both ends on average: the case for averaging
weights. A best point found on test data is a diagnosis, no model to report; choose one on validation
data.

Of adapters the *factors* are interpolated, A and B apart, which is not the same as interpolating
their updates ``B A`` (see ``guywire.interpolate_adapters``).

Source: Frankle, Dziugaite, Roy, Carbin, arXiv 1912.05671 (the barrier); Mirzadeh et al., "Linear Mode
Connectivity in Multitask and Continual Learning", arXiv 2010.04495; Ren et al., arXiv 2402.18865 (of
LoRA adapters).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.aside import undisturbed
from guywire.core.errors import DataError, UsageError
from guywire.core.selection import unwrap
from guywire.core.tensors import Tensors
from guywire.diagnostics import _evaluation
from guywire.diagnostics.curves import ALL, Connectivity, with_mean

__all__ = ["connectivity", "interpolate", "moving_statistics"]

Function = Callable[[Tensors], float | Mapping[str, float]]


def connectivity(
    model: nn.Module | Function,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    evals: Mapping[str, Any] | None = None,
    *,
    points: int = 11,
    statistics: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    each: Callable[[float], None] | None = None,
) -> Connectivity:
    """Measure loss and accuracy along the straight line between two sets of weights.

    A model is evaluated without dropout and comes back as it was, weights included. Its weights are
    written meanwhile, so do not call this between a forward pass and its backward pass.

    Args:
        model: into which both fit; or a function from named tensors to a loss, or to a mapping from
            names of sets to losses.
        start: names, as in ``model.state_dict()``, to tensors: all of it, or a part such as an
            adapter. What is not named stays as it is in the model.
        end: the same names and shapes.
        evals: names of sets to a batch or an iterable of batches. Classes are softmax classes; the
            labels of a causal language model of Hugging Face are shifted as it does; -100 does not
            count. Needed with a model.
        points: positions, at least 3, equally spaced, both ends among them.
        statistics: batches by which the running statistics of BatchNorm layers are computed anew at
            each position. Needed where the two ends differ in them: an interpolated mean and
            variance do not belong to the interpolated weights.
        forward: how to run the model on a batch.
        each: called after each position with that position, for a progress bar.

    Returns:
        The curves.

    Raises:
        UsageError: names or shapes do not fit, or the arguments do not go together.
        DataError: a set is empty, or has no label that counts.

    Example:
        >>> far, near = {"w": torch.tensor(-1.0)}, {"w": torch.tensor(1.0)}
        >>> found = connectivity(lambda p: -float(p["w"] ** 2), far, near)
        >>> found.barrier(), found.best(), found.distance
        (1.0, 1.0, 2.0)
    """
    if points < 3:
        raise UsageError(f"points={points}: two ends and a point between them make 3 at least")
    _check_pair(start, end)
    positions = tuple(i / (points - 1) for i in range(points))
    if isinstance(model, nn.Module):
        if not evals:
            raise UsageError("evals is missing: a mapping from names to batches to evaluate on")
        found = _along(unwrap(model), start, end, evals, positions, statistics, forward, each)
    else:
        if evals is not None or statistics is not None or forward is not None:
            raise UsageError("a function evaluates itself: leave out evals, statistics and forward")
        found = _along_function(model, start, end, positions, each)
    losses, accuracies = found
    squares = [
        (end[n].detach().double() - t.detach().double().to(end[n].device)).square().sum().item()
        for n, t in start.items()
        if t.is_floating_point()
    ]
    return Connectivity(
        positions, with_mean(losses), with_mean(accuracies), math.sqrt(math.fsum(squares))
    )


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], position: float) -> Tensors:
    """Return ``(1 - position) * start + position * end``; both ends come out bit for bit.

    Args:
        start: names to tensors.
        end: the same names and shapes.
        position: 0 for the start, 1 for the end.

    Returns:
        New tensors in the types of ``start``, computed in at least float32. Whole numbers (counters,
        masks) are those of the nearer end.

    Example:
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)
        {'w': tensor([0.2500, 0.2500])}
    """
    out = {}
    for name, a in start.items():
        b = end[name].detach().to(a.device)
        a = a.detach()
        if position in (0.0, 1.0) or not a.is_floating_point():
            out[name] = (a if position < 0.5 else b).to(a.dtype, copy=True)
        else:
            wide = torch.promote_types(a.dtype, torch.float32)
            out[name] = torch.lerp(a.to(wide), b.to(wide), position).to(a.dtype)
    return out


def moving_statistics(
    model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor]
) -> str | None:
    """Return the first BatchNorm layer whose running statistics differ between two sets of weights.

    Args:
        model: into which both fit.
        start: names to tensors.
        end: the same names.

    Returns:
        The layer's name, or ``None``.
    """
    for norm in _norms(model):
        for name in _buffers_of(norm)[:2]:
            if name in start and name in end:
                one, two = start[name], end[name].to(start[name].device)
                if one.shape != two.shape or not torch.equal(one, two):
                    return norm
    return None


def _along(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    evals: Mapping[str, Any],
    positions: Sequence[float],
    statistics: Iterable[Any] | None,
    forward: Callable[[nn.Module, Any], Any] | None,
    each: Callable[[float], None] | None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    own = model.state_dict()
    for name, value in start.items():
        if name not in own:
            raise UsageError(
                f"the model has no {name!r}: names must be those of model.state_dict()"
            )
        if own[name].shape != value.shape:
            raise UsageError(
                f"{name!r} is {tuple(own[name].shape)} in the model and {tuple(value.shape)} in the "
                "weights: they belong to different models"
            )
    norms = _norms(model)
    if statistics is None and (differing := moving_statistics(model, start, end)):
        raise UsageError(
            f"the two ends differ in the running statistics of {differing!r}, and statistics in "
            "between belong to no weights: give statistics=, batches to compute them anew"
        )
    sets = {
        name: _evaluation._choose(name, data, None, torch.Generator())
        for name, data in evals.items()
    }
    shown = list(statistics) if statistics is not None else None
    run = batches.forward if forward is None else forward
    written = dict(start) | {n: own[n] for name in norms for n in _buffers_of(name) if n in own}
    kept = {name: own[name].detach().clone() for name in written}
    losses: dict[str, list[float]] = {name: [] for name in sets}
    accuracies: dict[str, list[float]] = {name: [] for name in sets}
    try:
        with undisturbed(model, mode=False), torch.no_grad():
            for position in positions:
                _write(own, interpolate(start, end, position))
                if shown is not None:
                    _recompute(model, norms.values(), shown, run)
                for name, data in sets.items():
                    loss, accuracy = _measure(model, name, data, run)
                    losses[name].append(loss)
                    accuracies[name].append(accuracy)
                if each is not None:
                    each(position)
    finally:
        _write(own, kept)
    return losses, accuracies


def _along_function(
    function: Function,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    positions: Sequence[float],
    each: Callable[[float], None] | None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    losses: dict[str, list[float]] = {}
    for position in positions:
        value = function(interpolate(start, end, position))
        found = value if isinstance(value, Mapping) else {ALL: value}
        for name, loss in found.items():
            losses.setdefault(name, []).append(float(loss))
        if each is not None:
            each(position)
    return losses, {}


def _measure(
    model: nn.Module, name: str, data: Sequence[Any], run: Callable[[nn.Module, Any], Any]
) -> tuple[float, float]:
    device, shifted = batches.device_of(model), batches.is_causal(model)
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in data:
        batch = batches.to(batch, device)
        logits, labels = batches.logits_of(run(model, batch)), batches.labels_of(batch)
        if shifted and labels.dim() == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = logits.reshape(-1, logits.shape[-1]).float()
        labels = labels.reshape(-1)
        counted = labels != -100
        loss = F.cross_entropy(flat, labels, reduction="sum", ignore_index=-100)
        right = (flat.argmax(-1) == labels)[counted].sum()
        total += torch.stack([loss.double(), right.double(), counted.sum().double()])
    loss, right, count = total.tolist()
    if count == 0:
        raise DataError(f"the set {name!r} has no label that counts (all are -100)")
    return loss / count, right / count


def _recompute(
    model: nn.Module,
    norms: Iterable[nn.modules.batchnorm._BatchNorm],
    data: Sequence[Any],
    run: Callable[[nn.Module, Any], Any],
) -> None:
    """Compute running statistics as plain means over the batches."""
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        for norm, _ in momenta:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        for batch in data:
            run(model, batches.to(batch, batches.device_of(model)))
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
            norm.training = False


def _norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


def _buffers_of(name: str) -> list[str]:
    prefix = f"{name}." if name else ""
    return [f"{prefix}{b}" for b in ("running_mean", "running_var", "num_batches_tracked")]


def _write(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _check_pair(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    if not start:
        raise UsageError("the start names no tensors: give state dicts, or parts of them")
    if start.keys() != end.keys():
        name = min(start.keys() ^ end.keys())
        side = "start" if name in start else "end"
        raise UsageError(f"only the {side} has {name!r}: both must name the same tensors")
    for name, value in start.items():
        if value.shape != end[name].shape:
            raise UsageError(
                f"{name!r} is {tuple(value.shape)} at the start and {tuple(end[name].shape)} at the "
                "end: adapters of different rank have no line between them, convert one first"
            )
