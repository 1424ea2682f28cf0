"""How a model is spread over processes: wrapped by DDP, sharded by FSDP2, or neither."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import distributed, nn

from guywire.core import _stepping

__all__ = ["data_parallel", "everyones", "is_sharded"]


def data_parallel(model: Any) -> nn.parallel.DistributedDataParallel | None:
    """Return the DDP wrapper around a model, also where ``torch.compile`` came after it.

    Args:
        model: as the user passed it.

    Returns:
        The wrapper, or ``None``.
    """
    while isinstance(model, nn.Module):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        model = getattr(model, "_orig_mod", None)
    return None


def is_sharded(model: nn.Module) -> bool:
    """Say whether a model, or a part of it, is sharded: by ``fully_shard``, or as DTensors at all.

    Args:
        model: any module.

    Returns:
        The answer, also while FSDP2 holds all parameters gathered.
    """
    return any(_stepping.is_fsdp(module) for module in model.modules()) or any(
        hasattr(p, "device_mesh") for p in model.parameters()
    )


def everyones(values: Collection[int], model: nn.Module) -> set[int]:
    """Return the union of numbers over the processes that train one model together.

    Under DDP and FSDP2 every process must call it; else nothing is communicated.

    Args:
        values: this process's.
        model: as the user passed it.

    Returns:
        The union.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return set(values)
    wrapper = data_parallel(model)
    if wrapper is None and not is_sharded(model):
        return set(values)
    group = None if wrapper is None else wrapper.process_group
    lists: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(lists, list(values), group=group)
    return {value for one in lists for value in one}
