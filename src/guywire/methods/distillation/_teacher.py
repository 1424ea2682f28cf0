"""The teacher: a frozen copy of the model, and how it is saved and rebuilt."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import batches
from guywire.core.errors import AttachError, CheckpointError, DataError
from guywire.core.selection import canonical, unwrap
from guywire.core.tensors import Tensors

MARK = "_guywire_capture"


def freeze(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model: eval mode, no gradients, without our own hooks.

    Args:
        model: the user's module, with or without wrappers.

    Returns:
        The copy; it shares no memory with the model.

    Raises:
        AttachError: the model is sharded by FSDP2, or cannot be copied.
    """
    inner = unwrap(model)
    if any(cls.__name__ == "FSDPModule" for m in inner.modules() for cls in type(m).__mro__):
        raise AttachError(
            "distillation copies the model, and modules sharded by fully_shard cannot be copied: "
            "use DDP for it, or hold the parameters with gw.L2 or gw.EWC, which work on shards"
        )
    try:
        teacher = copy.deepcopy(inner)
    except Exception as error:  # whatever a user's __deepcopy__ may raise
        raise AttachError(
            f"the model cannot be copied for a teacher ({error}): keep no tensor with a graph, "
            "and nothing uncopyable such as a lock, as an attribute of a module"
        ) from error
    for module in teacher.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hasattr(hook, MARK)]:
                del hooks[key]
    return teacher.eval().requires_grad_(False)


def tensors_of(teacher: nn.Module) -> Tensors:
    """Return a module's parameters and persistent buffers under canonical names, tied ones once.

    Args:
        teacher: the module.

    Returns:
        Names to detached tensors that share its memory.
    """
    out: Tensors = {}
    known: set[int] = set()
    for name, value in teacher.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in known:
            known.add(id(value))
            out[canonical(name)] = value.detach()
    return out


def rebuild(model: nn.Module, saved: Tensors, *, grown: bool) -> nn.Module:
    """Return a teacher with saved tensors, built as a copy of the model that is attached now.

    Args:
        model: the attached model; a head may have grown since the state was saved.
        saved: names to tensors, from :func:`tensors_of`.
        grown: whether the model may have parameters that the saved teacher lacks.

    Returns:
        The teacher.

    Raises:
        CheckpointError: the saved tensors do not fit the model.
    """
    teacher = freeze(model)
    targets = tensors_of(teacher)
    for name, value in saved.items():
        if name not in targets:
            raise CheckpointError(
                f"the saved teacher has {name!r}, which the attached model lacks: "
                "build the same model before loading"
            )
        if targets[name].shape != value.shape:
            raise CheckpointError(
                f"the saved teacher's {name!r} has the shape {tuple(value.shape)}, the attached "
                f"model's {tuple(targets[name].shape)}: let a head grow by blocks of its own"
            )
    missing = targets.keys() - saved.keys()
    if missing and not grown:
        raise CheckpointError(
            f"the attached model has {min(missing)!r}, which the saved teacher lacks: consolidate "
            "with data, so that the old classes are known, or build the same model before loading"
        )
    with torch.no_grad():
        for name, value in saved.items():
            targets[name].copy_(value)
    return teacher


def classes_in(data: Iterable[Any]) -> Tensor:
    """Return the sorted class numbers among the labels of some batches.

    Args:
        data: batches.

    Returns:
        ``[classes]``, int64, on the CPU.

    Raises:
        DataError: the labels are no class numbers, or there are none.
    """
    found: list[Tensor] = []
    for batch in data:
        labels = batches.labels_of(batch)
        if labels.is_floating_point() or labels.is_complex():
            raise DataError(
                f"labels of type {labels.dtype} are no class numbers, so there are no old classes: "
                "distil features (gw.FeatureDistillation) instead"
            )
        found.append(labels.detach().unique().cpu().long())
    if found:
        classes = torch.cat(found).unique()
        classes = classes[classes >= 0]  # -100 marks tokens that do not count
        if len(classes):
            return classes
    raise DataError(
        "the data to consolidate has no labels: pass a list or a DataLoader of the task's batches, "
        "not an iterator that was used up"
    )
