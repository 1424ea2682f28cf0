"""LoRA adapters for the methods of a comparison that train nothing else: PEFT's, put in place."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from guywire.core.errors import UsageError, need
from guywire.lab.models.seeding import seeded

__all__ = ["OPTIONS", "inject", "names"]

OPTIONS: dict[str, tuple[type, Any, str]] = {
    "rank": (int, 8, "rank of each LoRA adapter"),
    "alpha": (float, 16.0, "an adapter's update is scaled by alpha / rank"),
    "adapters": (int, 1, "adapters side by side on each layer"),
    "lr": (float, 1e-3, "learning rate, in place of the run's: adapters want a larger one"),
}
"""What can be asked of them, beside a method's own options: kind, default and meaning."""

# What projections to queries and values are called across encoders and their versions.
_ADAPTED = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn", "in_proj")


def names(count: int) -> list[str]:
    """Return what the adapters are called.

    Args:
        count: how many.

    Returns:
        PEFT's names for them.
    """
    return ["default"] if count == 1 else [f"group_{i}" for i in range(count)]


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
    peft = need("peft", extra="adapters")
    rank, alpha, count = settings["rank"], settings["alpha"], settings["adapters"]
    for name, value in (("rank", rank), ("adapters", count), ("alpha", alpha)):
        if value <= 0:
            raise UsageError(f"{name} is {value} for the LoRA adapters: it must be above 0")
    targets = _targets(backbone)
    backbone.requires_grad_(False)
    with seeded(generator), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        for name in names(count):
            config = peft.LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets
            )
            peft.inject_adapter_in_model(config, backbone, adapter_name=name)
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names(count))


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
