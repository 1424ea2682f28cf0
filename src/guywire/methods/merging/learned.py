"""Learn each layer's q by gradient, from the fine-tuned model's largest logits. No labels.

What the paper's code does for language models. A linear layer with pruned change ``D`` computes

    y = x W_base + x D / (|a| + 1 - p) + b

with one trainable number ``a`` a layer, and all of them are trained to match the teacher's top-5
logits. Weights get no gradient.

Source: the released code of "DARE the Extreme", arXiv 2410.09344.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.aside import undisturbed
from guywire.core.errors import UsageError
from guywire.core.selection import canonical, unwrap
from guywire.methods.merging import dare
from guywire.methods.merging.inputs import is_linear
from guywire.methods.merging.search import parameters_for

__all__ = ["learn_q"]

_START = 1e-4
_EVERY = 10
_PATIENCE = 5


def learn_q(
    model: nn.Module,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rate: float,
    data: Iterable[Any],
    valid: Iterable[Any],
    *,
    seed: int = 0,
    lr: float = 1e-2,
    steps: int = 200,
    top: int = 5,
    select: str | Iterable[str] | None = ("*mlp*", "*attn*"),
    exclude: str | Iterable[str] = (),
) -> dict[str, float]:
    """Return a q for every pruned tensor, learnt on one mask.

    Args:
        model: what the tensors belong to, with the fine-tuned weights or others; it keeps its own.
        base: names to pretrained parameters.
        tuned: names to fine-tuned parameters.
        rate: share that is dropped, in [0, 1).
        data: batches to learn on (the paper: 8 sequences a batch), read over and over.
        valid: batches to stop by, every 10 steps, after 5 times without improvement.
        seed: of the mask; edit with the same one.
        lr: of AdamW, with a cosine over ``steps``.
        steps: at most.
        top: logits of the fine-tuned model that are matched at each position.
        select: globs over the tensors to prune; decoders keep the rest as fine-tuned.
        exclude: globs over names to leave as fine-tuned.

    Returns:
        Names to q in (1 - rate, 1]; tensors that are no weight of a linear layer get their layer's
        q (biases) or the mean.

    Raises:
        UsageError: there is no data, names or shapes do not fit, or no linear layer is pruned.
        SelectionError: nothing is left to prune.
    """
    inner = unwrap(model)
    kept = dare.keep(base, tuned, rate, seed=seed, select=select, exclude=exclude)
    params = parameters_for(inner, tuned)
    own = {name: value.detach().clone() for name, value in params.items()}
    wants = {name: p.requires_grad for name, p in inner.named_parameters()}
    device = batches.device_of(inner)
    learning, held_out = ([batches.to(b, device) for b in part] for part in (data, valid))
    if not learning or not held_out:
        raise UsageError("learning q needs at least one batch to learn on and one to stop by")
    layers = {
        f"{name}.weight": module
        for n, module in inner.named_modules()
        if is_linear(module) and f"{(name := canonical(n))}.weight" in kept
    }
    if not layers:
        raise UsageError(
            f"none of the {len(kept)} pruned tensors is the weight of a linear layer: select some"
        )
    handles: list[Any] = []
    with undisturbed(inner, mode=False):
        try:
            inner.requires_grad_(False)
            _put(params, tuned)
            targets = [_top(inner, batch, top) for batch in [*learning, *held_out]]
            start = {n: base[n] if n in layers else v for n, v in tuned.items()}
            _put(params, start)
            scales = {n: torch.full((), _START, device=device, requires_grad=True) for n in layers}
            for name, layer in layers.items():
                change = dare.rescaled(torch.zeros_like(tuned[name]), tuned[name] - base[name],
                                       kept[name], 1.0)  # fmt: skip
                handles.append(_scaled(layer, change.to(params[name]), scales[name], 1.0 - rate))
            pairs = list(zip([*learning, *held_out], targets, strict=True))
            best = _fit(inner, list(scales.values()), pairs[: len(learning)],
                        pairs[len(learning) :], lr, steps)  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
            _put(params, own)
            for name, p in inner.named_parameters():
                p.requires_grad_(wants[name])
    qs = {n: min(1.0, abs(a) + 1.0 - rate) for n, a in zip(scales, best, strict=True)}
    mean = sum(qs.values()) / len(qs)
    return {n: qs.get(n, qs.get(n.removesuffix(".bias") + ".weight", mean)) for n in kept}


def _put(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            params[name].copy_(value)


def _top(model: nn.Module, batch: Any, top: int) -> Any:
    with torch.no_grad():
        return batches.logits_of(batches.forward(model, batch)).topk(top, dim=-1)


def _scaled(layer: nn.Module, change: Tensor, scale: Tensor, low: float) -> Any:
    """Add ``x D / (|a| + 1 - p)`` to a layer's output."""
    weight = change.T if isinstance(layer, nn.Linear) else change

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + (args[0] @ weight) / (scale.abs() + low).to(output.dtype)

    return layer.register_forward_hook(hook)


def _error(model: nn.Module, pair: tuple[Any, Any]) -> Tensor:
    batch, target = pair
    logits = batches.logits_of(batches.forward(model, batch))
    return nn.functional.mse_loss(logits.gather(-1, target.indices), target.values)


def _fit(
    model: nn.Module,
    scales: Sequence[Tensor],
    learning: Sequence[tuple[Any, Any]],
    held_out: Sequence[tuple[Any, Any]],
    lr: float,
    steps: int,
) -> list[float]:
    optimizer = torch.optim.AdamW(scales, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    best, lowest, since = [_START] * len(scales), math.inf, 0
    for number, pair in enumerate(islice(cycle(learning), steps + 1)):
        if number % _EVERY == 0:
            with torch.no_grad():
                error = sum(float(_error(model, other)) for other in held_out)
            if error < lowest:
                best, lowest, since = [float(a.detach()) for a in scales], error, 0
            else:
                since += 1
                if since >= _PATIENCE:
                    break
        if number == steps:
            break
        with torch.enable_grad():
            gradients = torch.autograd.grad(_error(model, pair), scales)
        for scale, gradient in zip(scales, gradients, strict=True):
            scale.grad = gradient
        optimizer.step()
        schedule.step()
    return best
