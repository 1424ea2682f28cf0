"""What AlignGuardLoRA refuses at attach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from guywire.core.errors import SelectionError, UsageError
from guywire.core.regularizer import strength_at
from guywire.methods.adapters._lora import Site

__all__ = ["check_layer", "check_values"]


def check_values(regularizer: Any) -> None:
    """Refuse values that make no sense.

    Args:
        regularizer: an ``AlignGuardLoRA``.

    Raises:
        UsageError: names the value.
    """
    strength_at(regularizer.strength, 0)
    choices = {
        "mode": ("two_branch", "projected"),
        "large": ("update", "weight"),
        "reduce": ("mean", "sum"),
        "normalise": ("trace", "top", None),
    }
    for name, allowed in choices.items():
        if (value := getattr(regularizer, name)) not in allowed:
            raise UsageError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")
    for name in ("aligned", "task", "collision", "beta"):
        if not 0.0 <= (value := getattr(regularizer, name)) < float("inf"):
            raise UsageError(f"{name}={value} must be a finite number of at least 0")
    for name in ("overlap", "energy"):
        if not 0.0 <= (value := getattr(regularizer, name)) <= 1.0:
            raise UsageError(f"{name}={value} is a share: it must lie in [0, 1]")


def check_layer(
    name: str, group: list[Site], mode: str, metric: Mapping[str, Tensor] | None
) -> None:
    """Refuse a layer that does not fit.

    Args:
        name: of the layer.
        group: its adapters.
        mode: as the regularizer's.
        metric: the regularizer's ``task_metric``.

    Raises:
        SelectionError: the weight is no plain matrix.
        UsageError: there are not two branches, or the metric does not fit.
    """
    base, shape = group[0].base, (group[0].B.shape[0], group[0].A.shape[1])
    if tuple(base.shape) != shape or not base.is_floating_point():
        raise SelectionError(
            f"the weight of {name!r} is stored as {base.dtype} of shape {tuple(base.shape)}, not as "
            f"a plain matrix {shape}: load the model without quantisation"
        )
    if mode == "two_branch" and len(group) != 2:
        has = ", ".join(site.adapter for site in group)
        raise UsageError(
            f"mode='two_branch' needs two adapters on {name!r}, which has {has}: add one with "
            "guywire.add_branch(model), name two with adapters=..., or use mode='projected'"
        )
    if metric is not None and (name not in metric or tuple(metric[name].shape) != shape):
        raise UsageError(f"task_metric needs a tensor of shape {shape} for the layer {name!r}")
