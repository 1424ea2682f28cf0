"""Several LoRA adapters side by side on the same layers, all of them active and trainable.

    y = W0 x + sum_i B_i (A_i x),     A_i [r, in] Kaiming-uniform, B_i [out, r] zero

They are PEFT's own layers, so everything that knows PEFT (saving, merging, quantised bases) works on
them. The scaling is 1 (``lora_alpha = r``), there is no dropout, and a group starts as the model it
was put on, bit for bit.

Source: the groups of Hu, Zhang, Qi, Shi, Gao, "Learn to Preserve and Diversify:
Parameter-Efficient Group with Orthogonal Regularization for Domain Generalization", arXiv 2407.15085.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from guywire.core.aside import random_state_kept
from guywire.core.batches import device_of
from guywire.core.errors import SelectionError, UsageError, need

__all__ = ["lora_group", "merge_lora_group"]


def lora_group(
    model: nn.Module,
    n: int = 4,
    r: int = 4,
    *,
    target_modules: str | Sequence[str],
    generator: torch.Generator | None = None,
    wrap: bool = False,
) -> nn.Module:
    """Freeze a model and put ``n`` LoRA adapters of rank ``r`` on each of some layers.

    A new head is trained beside them: set ``requires_grad_(True)`` on it afterwards.

    Args:
        model: any module, changed in place; or a ``PeftModel``, which gets the adapters beside
            those that it has (these are switched off and frozen).
        n: adapters a layer, called ``group_0``, ``group_1``, ...
        r: rank of each.
        target_modules: which linear layers, as PEFT's ``LoraConfig`` takes them: a regular
            expression, or ends of names such as ``["q_proj", "v_proj"]``.
        generator: draws the factors A, on the CPU; one seeded with 0 if ``None``. The global random
            state is neither used nor changed.
        wrap: return a ``PeftModel`` around the model, which saves adapters as folders, instead of
            the model itself. (When the Trainer of transformers resumes from a checkpoint, it turns
            off all adapters of a ``PeftModel`` but the first.)

    Returns:
        The model, or the ``PeftModel`` around it. Only the new factors are trainable.

    Raises:
        UsageError: ``n`` or ``r`` is below 1, or the model has adapters of these names.
        SelectionError: PEFT finds no such layer, or cannot adapt it.
        MissingExtraError: ``peft`` is not installed.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> net = lora_group(net, n=2, r=3, target_modules=["0"])
        >>> sum(p.numel() for p in net.parameters() if p.requires_grad)  # 2 * 3 * (6 + 8)
        84
    """
    peft: Any = need("peft", extra="adapters")
    for name, value in (("n", n), ("r", r)):
        if value < 1:
            raise UsageError(f"{name} is {value}: a group needs at least 1")
    names = [f"group_{i}" for i in range(n)]
    if taken := set(names) & getattr(model, "peft_config", {}).keys():
        raise UsageError(
            f"the model has an adapter {min(taken)!r} already: merge it (merge_lora_group), or "
            "delete it first"
        )

    def config() -> Any:
        where = target_modules if isinstance(target_modules, str) else list(target_modules)
        return peft.LoraConfig(
            r=r, lora_alpha=r, lora_dropout=0.0, bias="none", target_modules=where
        )

    # PEFT warns of several adapters, which are meant, and of transposed layers, which it handles.
    with random_state_kept(device_of(model)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        try:
            for name in names:
                if isinstance(model, peft.PeftModel):
                    cast(Any, model).add_adapter(name, config())
                elif wrap:
                    model = peft.get_peft_model(model, config(), adapter_name=name)
                else:
                    model = peft.inject_adapter_in_model(config(), model, adapter_name=name)
        except ValueError as error:
            raise SelectionError(
                f"PEFT cannot put LoRA on target_modules={target_modules!r}: {error}"
            ) from error
    layers = _activate(model, names)
    _draw(layers, names, generator or torch.Generator().manual_seed(0))
    return model


def merge_lora_group(model: nn.Module) -> nn.Module:
    """Add all active adapters to the weights they adapt, and take the adapters off.

    Args:
        model: what :func:`lora_group` returned, or any model with PEFT's adapters.

    Returns:
        The plain model, with the names of parameters that it had before; a ``PeftModel`` gives back
        the model inside.

    Raises:
        SelectionError: there is nothing to merge.
        MissingExtraError: ``peft`` is not installed.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> net = merge_lora_group(lora_group(net, n=2, r=3, target_modules=["0"]))
        >>> [name for name, _ in net.named_parameters()]
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    peft: Any = need("peft", extra="adapters")
    if isinstance(model, peft.PeftModel):
        return cast(Any, model).merge_and_unload(safe_merge=True)
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if not found:
        raise SelectionError("the model has no adapters to merge: call lora_group first")
    for name, layer in found:
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _activate(model: nn.Module, names: list[str]) -> list[Any]:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
    # PeftModel.set_adapter takes one name; the tuner inside it remembers the list.
    tuner: Any = getattr(model, "base_model", None)
    if isinstance(tuner, BaseTuner):
        tuner.active_adapter = list(names)
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def _draw(layers: list[Any], names: list[str], generator: torch.Generator) -> None:
    # PEFT's own start (Kaiming with a = sqrt 5), but from a generator, and the same on any device.
    for layer in layers:
        for name in names:
            if name not in layer.lora_A:
                continue
            factor = layer.lora_A[name].weight
            drawn = torch.empty(factor.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                factor.copy_(drawn)
