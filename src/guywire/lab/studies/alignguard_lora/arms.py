"""The arms: adapters, and what holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core.regularizer import Regularizer, Step
from guywire.curvature import diagonal_fisher
from guywire.lab.studies.alignguard_lora.texts import Prompts
from guywire.methods.adapters._lora import Site, sites

__all__ = ["ARMS", "HoldUpdates", "batches_of", "dress", "holds"]

TARGETS = ("q_proj", "v_proj", "up_proj", "gate_proj", "down_proj")

ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "L2": {},
    "EWC": {},
    "aligned": {"mode": "projected", "task": 0.0, "collision": 0.0},
    "aligned + task": {"mode": "projected", "collision": 0.0},
    "full": {},
    "full, no geodesic": {"collision": 0.05, "overlap": 1.0},
    "full, no Riemannian": {"collision": 0.05, "overlap": 0.0},
}
"""Condition to keywords of ``AlignGuardLoRA`` besides the strength (the first three do not use it)."""


def dress(model: nn.Module, arm: str, rank: int, generator: torch.Generator) -> nn.Module:
    """Put LoRA on queries, values and the MLP; two branches share the rank.

    Args:
        model: the aligned model, changed in place.
        arm: as in :data:`ARMS`.
        rank: of all adapters of a layer together.
        generator: draws the factors A.

    Returns:
        The model; only the factors are trained.
    """
    n = 2 if arm.startswith("full") else 1
    return gw.lora_group(model, n, rank // n, target_modules=list(TARGETS), generator=generator)


def holds(
    model: nn.Module, arm: str, strength: float, alignment: Sequence[Mapping[str, Tensor]]
) -> list[Regularizer]:
    """Return what holds the updates, having seen the alignment data.

    Args:
        model: dressed, not yet trained.
        arm: as in :data:`ARMS`.
        strength: of the penalty.
        alignment: batches of prompts with the aligned answers.

    Returns:
        No regularizer, or one.
    """
    if arm == "plain":
        return []
    if arm == "L2":
        return [HoldUpdates(strength)]
    if arm == "EWC":
        return [HoldUpdates(strength, _diagonal(model, alignment))]
    regularizer = gw.AlignGuardLoRA(strength, **ARMS[arm])
    regularizer.fit(model, alignment)
    return [regularizer]


def batches_of(prompts: Prompts, size: int = 32) -> list[dict[str, Tensor]]:
    """Return prompts in batches in which the answers count.

    Args:
        prompts: of both kinds.
        size: of a batch.

    Returns:
        The batches.
    """
    return [prompts.batch(rows) for rows in torch.arange(len(prompts)).split(size)]


@final
class HoldUpdates(Regularizer):
    """The arms to compare with: ``strength * sum F_ij D_ij^2`` over the updates D.

    Args:
        strength: of the penalty.
        metric: adapted layer to F, ``[out, in]``; ones if ``None`` (L2).
    """

    title: ClassVar[str] = "A diagonal penalty on LoRA's updates"
    place: ClassVar[str] = "step"

    def __init__(self, strength: float, metric: Mapping[str, Tensor] | None = None) -> None:
        self.strength = strength
        self.metric = metric
        self._sites: list[Site] = []

    def setup(self, model: nn.Module) -> None:
        """Find the adapters."""
        self._sites = sites(model)

    def before_step(self, step: Step) -> None:
        """Add the gradient."""
        for site in self._sites:
            pull = 2.0 * self.strength * site.scaling * site.update().detach()
            if self.metric is not None:
                pull = pull * self.metric[site.name]
            for p, g in ((site.A, site.B.detach().T @ pull), (site.B, pull @ site.A.detach().T)):
                p.grad = g if p.grad is None else p.grad + g


def _diagonal(model: nn.Module, alignment: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of the weights under the adapters, of mean 1 a layer."""
    bases = {site.name: site.layer.get_base_layer().weight for site in sites(model)}  # type: ignore[operator]
    wanted = {f"{name}.base_layer.weight" for name in bases}
    for weight in bases.values():  # the diagonal is that of weights that could be trained
        weight.requires_grad_(True)
    try:
        fisher = diagonal_fisher(
            model, alignment, labels="true", select=lambda name, _: name in wanted
        )
    finally:
        for weight in bases.values():
            weight.requires_grad_(False)
    scaled = {name: fisher[f"{name}.base_layer.weight"] for name in bases}
    return {name: value / value.mean() for name, value in scaled.items()}
