"""The arms: which weights move, and what holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import guywire as gw
from guywire.core.errors import need
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.sara.network import (
    Diffusion,
    batch,
    cosine,
    errors,
    random_masks,
    start,
)
from guywire.lab.studies.study import Work

__all__ = ["ARMS", "fine_tune", "lora_rank"]

ARMS = ("SaRA", "no rank loss", "no adjustment", "largest", "random", "LoRA", "full")

_LORA_LAYERS = r"to_[qkv]|to_out\.0|time_emb_proj"


def fine_tune(
    work: Work, *, arm: str, rate: float, strength: float = 0.0, tune: bool = False
) -> list[dict[str, Any]]:
    """Fine-tune the pretrained U-Net on the new style; measure it on both.

    Args:
        work: of the study.
        arm: of ``ARMS``.
        rate: the learning rate, which falls along a cosine.
        strength: of the nuclear norm.
        tune: measure on validation emoji.

    Returns:
        Rows: errors and how they changed, numbers trained; of masked arms also the nuclear norm of
        the masked matrices, the share of the mask that is still small, and whether anything else
        moved.
    """
    s = work.settings
    model, parts = start(work)
    part = "valid" if tune else "test"
    source_before, target_before = errors(work, model, parts, part)
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    limit = gw.threshold_of_share(params.values(), s["share"])
    masks: dict[str, Tensor] | None = None
    if arm in ("LoRA", "full"):
        if arm == "LoRA":
            model = _with_lora(model, round(s["share"] * _count(params)), work)
        trained = [p for p in model.parameters() if p.requires_grad]
        method: list[gw.Regularizer] = []
    else:
        masks = _masks(arm, params, limit, s["share"], work.generator("mask"))
        sara = _sara(arm, s, strength, limit)
        trained = sara.prepare(model, masks)
        method = [sara]
    numbers = sum(p.numel() for p in trained)
    _train(work, model, trained, rate, method, parts["target train"])
    source, target = errors(work, model, parts, part)
    rows = [
        work.row("source_error", source),
        work.row("target_error", target),
        work.row("source_rise", source / source_before - 1.0),
        work.row("target_fall", 1.0 - target / target_before),
        work.row("trained", numbers),
    ]
    if tune:
        left = target / target_before
        rows.append(work.row("target_left", left))
        rows.append(work.row("balance", source / source_before + left))
    if masks is not None:
        rows += _of_the_mask(work, gw.sara_fold(model), params, masks, limit)
    return rows


def lora_rank(layers: Mapping[str, nn.Module], numbers: int) -> int:
    """Return the rank with which LoRA of these layers has about a given count of numbers.

    Args:
        layers: linear ones.
        numbers: to come near to.

    Returns:
        The rank, at least 1.

    Example:
        >>> lora_rank({"one": nn.Linear(10, 20)}, 95)
        3
    """
    each = 0
    for layer in layers.values():
        weight = layer.get_parameter("weight")
        each += weight.shape[0] + weight[0].numel()
    return max(1, round(numbers / each))


def _train(
    work: Work,
    model: nn.Module,
    trained: list[nn.Parameter],
    rate: float,
    method: list[gw.Regularizer],
    images: Tensor,
) -> None:
    s = work.settings
    process = Diffusion(s["noise_steps"])
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = cosine(optimizer, s["steps"])
    generator = work.generator("fine-tuning")
    with gw.attach(model, optimizer, method):
        for _ in range(s["steps"]):
            drawn = batch(images, s["batch"], generator)
            loss = process.loss(model, drawn, *process.draw(drawn, generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _sara(arm: str, settings: Mapping[str, Any], strength: float, limit: float) -> gw.SaRA:
    # Largest and random ones are above the threshold from the start: there is no second choice.
    adjusts = arm in ("SaRA", "no rank loss")
    return gw.SaRA(
        0.0 if arm == "no rank loss" else strength,
        threshold=limit,
        reselect_at=settings["steps"] // 2 if adjusts else None,
        rank_above=settings["rank_above"],
    )


def _masks(
    arm: str, params: Mapping[str, Tensor], limit: float, share: float, generator: torch.Generator
) -> dict[str, Tensor]:
    if arm == "largest":
        smaller = gw.smallest_masks(params, gw.threshold_of_share(params.values(), 1.0 - share))
        return {name: ~mask for name, mask in smaller.items()}
    if arm == "random":
        return random_masks(params, share, generator)
    return gw.smallest_masks(params, limit)


def _of_the_mask(
    work: Work,
    model: nn.Module,
    before: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    limit: float,
) -> list[dict[str, Any]]:
    nuclear, small, moved = 0.0, 0, 0
    for name, p in model.named_parameters():
        mask, p = masks[name], p.detach()
        if p.dim() == 2 and min(p.shape) > work.settings["rank_above"]:
            nuclear += float(gw.nuclear_norm(p * mask)[0])
        small += int((p.abs() < limit)[mask].sum())
        moved += int((p != before[name])[~mask].sum())
    return [
        work.row("nuclear_norm", nuclear),
        work.row("still_small", small / max(1, _count(masks, chosen=True))),
        work.row("moved_outside", moved),
    ]


def _count(tensors: Mapping[str, Tensor], *, chosen: bool = False) -> int:
    return sum(int(t.sum()) if chosen else t.numel() for t in tensors.values())


def _with_lora(model: nn.Module, numbers: int, work: Work) -> nn.Module:
    peft = need("peft", extra="adapters")
    layers = {
        name: module
        for name, module in model.named_modules()
        if re.search(rf"\.({_LORA_LAYERS})$", name)
    }
    rank = lora_rank(layers, numbers)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
    model.requires_grad_(False)
    with seeded(work.generator("LoRA")):
        return peft.inject_adapter_in_model(config, model)
