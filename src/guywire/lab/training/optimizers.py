"""The optimiser of a task, and usual settings where none are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from guywire.lab.training.config import Training

__all__ = ["defaults", "is_pretrained", "make"]

_RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3}
_PRETRAINED_RATES = {"sgd": 1e-2, "adam": 1e-4, "adamw": 1e-4}


def is_pretrained(model: str) -> bool:
    """Tell whether a model starts from weights that were trained before.

    Args:
        model: its name.

    Returns:
        True for ``efficientnet-lite0``, ``minilm`` and ``hf:NAME``.
    """
    return model in ("efficientnet-lite0", "minilm") or model.startswith("hf:")


def defaults(training: Training, model: str) -> dict[str, Any]:
    """Return the optimiser and the learning rate that stand for ``None``.

    Args:
        training: the settings.
        model: the model's name.

    Returns:
        ``optimizer`` and ``lr``.
    """
    pretrained = is_pretrained(model)
    kind = training.optimizer or ("adamw" if pretrained else "adam")
    rate = training.lr or (_PRETRAINED_RATES if pretrained else _RATES)[kind]
    return {"optimizer": kind, "lr": rate}


def make(training: Training, model: nn.Module, *, lr: float | None = None) -> torch.optim.Optimizer:
    """Make a fresh optimiser for the parameters that may move.

    Args:
        training: the settings.
        model: the model; its ``name`` decides settings that are not given.
        lr: in place of the settings' own.

    Returns:
        The optimiser.
    """
    settings = defaults(training, str(getattr(model, "name", "")))
    rate = settings["lr"] if lr is None else lr
    params = [p for p in model.parameters() if p.requires_grad]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(
            params,
            lr=rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
    kind = torch.optim.Adam if settings["optimizer"] == "adam" else torch.optim.AdamW
    return kind(params, lr=rate, weight_decay=training.weight_decay)
