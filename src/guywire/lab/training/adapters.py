"""LoRA adapters for the methods of a comparison that train nothing else: PEFT's, put in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import guywire
from guywire.core.errors import UsageError

__all__ = ["OPTIONS", "inject"]

OPTIONS: dict[str, tuple[type, Any, str]] = {
    "rank": (int, 8, "rank of each LoRA adapter"),
    "group": (int, 1, "adapters side by side on each layer"),
    "lr": (float, 1e-3, "learning rate, in place of the run's: adapters want a larger one"),
}
"""What can be asked of them, beside a method's own options: kind, default and meaning."""

# What projections to queries and values are called across encoders and their versions.
_ADAPTED = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn", "in_proj")


def inject(backbone: nn.Module, generator: torch.Generator, settings: Mapping[str, Any]) -> None:
    """Freeze a backbone and put trainable LoRA adapters on its query and value projections.

    A backbone without self-attention gets them on all its linear layers.

    Args:
        backbone: changed in place; its modules keep their names.
        generator: draws the first factors; the second ones are zero.
        settings: the options above, by name.

    Raises:
        UsageError: it has no linear layer, or a number makes no sense.
        MissingExtraError: ``peft`` is not installed.
    """
    for name in ("rank", "group"):
        if settings[name] < 1:
            raise UsageError(f"{name} is {settings[name]}: LoRA needs at least 1")
    guywire.lora_group(
        backbone,
        settings["group"],
        settings["rank"],
        target_modules=_targets(backbone),
        generator=generator,
    )


def _targets(backbone: nn.Module) -> list[str]:
    linear = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    found = [name for name in linear if name.rsplit(".", 1)[-1] in _ADAPTED]
    if not linear:
        raise UsageError(
            "LoRA adapts linear layers, and this model's backbone has none: use minilm, vit or "
            "hf:NAME, or a method without adapters"
        )
    return found or linear
