"""Every way of pruning, measured alike: for both parts of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.aside import undisturbed
from guywire.methods import merging
from guywire.methods.merging import LayerInputs

__all__ = ["METHODS", "Bed", "Result", "accuracy", "measure", "output_variance"]

METHODS = ("drop only", "DARE", "1/q_v", "1/q_e", "1/q by layer, eta", "q*", "MP", "WANDA")
"""Without rescaling; DARE; one q searched with and without labels; a q for each layer by eta, searched
without labels; the closed form for each layer; the largest changes; the largest by change times input."""


@dataclass(frozen=True)
class Bed:
    """A fine-tuned model, what it was before, and data that pruning may look at.

    Attributes:
        model: gets the edited weights; it has an ``encoder`` before its ``head``.
        base: names to pretrained weights.
        tuned: names to fine-tuned weights.
        valid: batches with labels, never of test data.
        test: batches with labels.
        search_masks: seeds of the masks that searches average over.
        test_masks: seeds of the masks that are measured; others than those of the searches.
    """

    model: nn.Module
    base: Mapping[str, Tensor]
    tuned: Mapping[str, Tensor]
    valid: Sequence[Any]
    test: Sequence[Any]
    search_masks: Sequence[int]
    test_masks: Sequence[int]

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model other weights.

        Args:
            weights: names to tensors, all of the model's parameters.
        """
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])


@dataclass(frozen=True)
class Result:
    """What one method at one rate gave.

    Attributes:
        accuracy: on test data, the mean over masks.
        spread: its standard deviation over masks; 0 where the method draws none.
        q: what survivors were divided by, the mean over tensors.
    """

    accuracy: float
    spread: float
    q: float


def accuracy(model: nn.Module, data: Sequence[Any]) -> float:
    """Return the share of samples whose class is found.

    Args:
        model: returns logits.
        data: batches with labels.

    Returns:
        A fraction.
    """
    right = total = 0
    with undisturbed(model, mode=False), torch.no_grad():
        for batch in data:
            labels = batches.labels_of(batch)
            right += int((batches.forward(model, batch).argmax(-1) == labels).sum())
            total += len(labels)
    return right / total


def measure(bed: Bed, rate: float, methods: Sequence[str] = METHODS) -> dict[str, Result]:
    """Prune by each method and measure what is left; the model ends as it was fine-tuned.

    Args:
        bed: model and data.
        rate: share of the change that is dropped; the head stays.
        methods: out of :data:`METHODS`.

    Returns:
        Method to result.
    """
    bed.put(bed.tuned)
    inputs = merging.layer_inputs(bed.model.get_submodule("encoder"), bed.valid)
    inputs = {f"encoder.{name}": seen for name, seen in inputs.items()}
    # Everything that looks at the fine-tuned model's outputs does so before the first edit.
    change = merging.output_change(bed.model.get_submodule("encoder"), bed.valid)
    found = {}
    for method in methods:
        if method in ("MP", "WANDA"):
            kept = _important(bed, rate, inputs if method == "WANDA" else {})
            found[method] = _measured(bed, [kept], 1.0)
            continue
        q = _factors(bed, rate, method, inputs, change)
        masks = [
            merging.keep(bed.base, bed.tuned, rate, seed=s, exclude="head.*")
            for s in bed.test_masks
        ]
        found[method] = _measured(bed, masks, q)
    bed.put(bed.tuned)
    return found


def output_variance(delta: Tensor, inputs: Tensor, rate: float, masks: int) -> float:
    """Return the measured variance of a layer's DARE error over what the formula says.

    Args:
        delta: change of a layer's weight, ``[out, in]``.
        inputs: one input, ``[in]``.
        rate: share that is dropped.
        masks: how many to draw.

    Returns:
        About 1: the sum over units of the variance over masks, over ``p / (1 - p) * sum Q``.
    """
    base, tuned = {"layer": torch.zeros_like(delta)}, {"layer": delta}
    errors = torch.stack(
        [
            (delta - merging.drop_and_rescale(base, tuned, rate, seed=s)["layer"]) @ inputs
            for s in range(masks)
        ]
    )
    _, variance = merging.error_moments(merging.contributions(delta, inputs), rate, 1.0 - rate)
    return float(errors.double().var(0).sum() / variance.double().sum())


def _factors(
    bed: Bed, rate: float, method: str, inputs: Mapping[str, LayerInputs], change: Any
) -> float | dict[str, float]:
    if method == "drop only":
        return 1.0
    if method == "DARE":
        return 1.0 - rate
    if method == "q*":
        return merging.layer_qs(bed.base, bed.tuned, rate, inputs)
    arguments = bed.model, bed.base, bed.tuned, rate
    options: dict[str, Any] = {"seeds": bed.search_masks, "exclude": "head.*"}
    if method == "1/q_v":
        found = merging.search_q(*arguments, lambda m: 1.0 - accuracy(m, bed.valid), **options)
        return found.best

    def moved(model: nn.Module) -> float:
        return change(model.get_submodule("encoder"))

    if method == "1/q_e":
        return merging.search_q(*arguments, moved, **options).best
    eta = merging.search_eta(*arguments, moved, inputs, **options).best
    return merging.layer_qs(bed.base, bed.tuned, rate, inputs, eta=eta)


def _important(bed: Bed, rate: float, inputs: Mapping[str, LayerInputs]) -> dict[str, Tensor]:
    """Keep by WANDA what has inputs, everything else by magnitude."""
    kept = {}
    for name in merging.prunable(bed.base, bed.tuned, exclude="head.*"):
        delta = bed.tuned[name] - bed.base[name]
        seen = inputs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        kept[name] = (
            merging.magnitude_mask(delta, rate)
            if seen is None
            else merging.wanda_mask(delta, seen.norms, rate)
        )
    return kept


def _measured(
    bed: Bed, masks: Sequence[Mapping[str, Tensor]], q: float | Mapping[str, float]
) -> Result:
    values = []
    for kept in masks:
        bed.put(merging.rescale_kept(bed.base, bed.tuned, kept, q))
        values.append(accuracy(bed.model, bed.test))
    mean = sum(values) / len(values)
    spread = float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0
    pruned = list(masks[0])
    factor = sum(q[n] for n in pruned) / len(pruned) if isinstance(q, Mapping) else q
    return Result(mean, spread, float(factor))
