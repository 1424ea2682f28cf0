"""A second LoRA adapter beside the one a model has, both active and both trained.

    y = W0 x + s B A x + s' B' A' x,     B' zero, so that nothing changes at first

Source: the two branches of AlignGuard-LoRA, arXiv 2508.02079, as this library reads it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

import torch
from torch import nn

from guywire.core.aside import random_state_kept
from guywire.core.batches import device_of
from guywire.core.errors import SelectionError, UsageError, need
from guywire.methods.adapters.groups import _activate, _draw

__all__ = ["add_branch"]


def add_branch(
    model: nn.Module,
    name: str = "aligned",
    *,
    like: str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put a second LoRA adapter on the layers that have one, and make both active.

    Parameters that were trained before still are, a new head for instance.

    Args:
        model: with one adapter, from ``peft.get_peft_model`` or ``peft.inject_adapter_in_model``.
        name: of the new adapter.
        like: the adapter whose configuration it takes; needed only where there are several.
        generator: draws the factors A, on the CPU; one seeded with 0 if ``None``. The global random
            state is neither used nor changed.

    Returns:
        The model, changed in place.

    Raises:
        SelectionError: the model has no adapter, or none called ``like``.
        UsageError: there are several and ``like`` is ``None``, or one called ``name`` already.
        MissingExtraError: ``peft`` is not installed.

    Example:
        >>> import guywire as gw
        >>> net = gw.lora_group(nn.Sequential(nn.Linear(6, 3)), n=1, r=2, target_modules=["0"])
        >>> net = add_branch(net)
        >>> net[0].active_adapters
        ['group_0', 'aligned']
    """
    peft = need("peft", extra="adapters")
    configs = getattr(model, "peft_config", {})
    if not configs:
        raise SelectionError(
            "the model has no adapter to put a branch beside: use peft.get_peft_model first"
        )
    if like is None and len(configs) > 1:
        raise UsageError(f"the model has the adapters {', '.join(configs)}: name one by like=...")
    first = next(iter(configs)) if like is None else like
    if first not in configs:
        raise SelectionError(f"the model has no adapter {first!r}: it has {', '.join(configs)}")
    if name in configs:
        raise UsageError(f"the model has an adapter {name!r} already: give the branch another name")
    config: Any = copy.deepcopy(configs[first])
    config.inference_mode = False
    trained = [p for p in model.parameters() if p.requires_grad]
    with random_state_kept(device_of(model)), warnings.catch_warnings():
        # PEFT warns of several adapters, which are meant, and of transposed layers.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        if isinstance(model, peft.PeftModel):
            cast(Any, model).add_adapter(name, config)
        else:
            model = peft.inject_adapter_in_model(config, model, adapter_name=name)
    layers = _activate(model, [first, name])
    for p in trained:
        p.requires_grad_(True)
    _draw(layers, [name], generator or torch.Generator().manual_seed(0))
    return model
