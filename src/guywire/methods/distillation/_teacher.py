"""The teacher: the model as it was, how it is run, and how it is saved and rebuilt.

A plain model's teacher is a frozen copy of it. Modules sharded by FSDP2 cannot be copied: there the
teacher is its shards alone, which trade places with the model's for a pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guywire.core import batches, exchange, processes, tensors
from guywire.core.aside import is_listener, undisturbed
from guywire.core.errors import AttachError, CheckpointError, DataError
from guywire.core.selection import canonical, unwrap
from guywire.core.tensors import Tensors


@dataclass(frozen=True)
class Shards:
    """The teacher of a sharded model: its parameters and persistent buffers.

    Attributes:
        values: canonical names to this process's copies, sharded as the model's own.
    """

    values: Tensors


Teacher = nn.Module | Shards


def freeze(model: nn.Module) -> Teacher:
    """Return the model as it is now, for good.

    Args:
        model: the user's module, with or without wrappers.

    Returns:
        A copy in eval mode, without gradients and without our own hooks; of a model sharded by
        FSDP2 its shards. It shares no memory with the model.

    Raises:
        AttachError: the model cannot be copied.
    """
    inner = unwrap(model)
    if processes.is_sharded(inner):
        return Shards({n: tensors.clone(t) for n, t in exchange.values_of(inner).items()})
    try:
        teacher = copy.deepcopy(inner)
    except Exception as error:  # whatever a user's __deepcopy__ may raise
        raise AttachError(
            f"the model cannot be copied for a teacher ({error}): keep no tensor with a graph, "
            "and nothing uncopyable such as a lock, as an attribute of a module"
        ) from error
    for module in teacher.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if is_listener(hook)]:
                del hooks[key]
    return teacher.eval().requires_grad_(False)


@contextmanager
def teaching(teacher: Teacher, model: nn.Module) -> Iterator[nn.Module]:
    """Give the module that answers as the teacher; of sharded models every process asks it.

    Args:
        teacher: from :func:`freeze`.
        model: the attached model, unwrapped; left as it is.

    Yields:
        A module in eval mode, to be run without autograd.
    """
    if isinstance(teacher, nn.Module):
        yield teacher
        return
    with exchange.exchanged(model, teacher.values), undisturbed(model, mode=False):
        yield model


def move(teacher: Teacher, model: nn.Module) -> Teacher:
    """Return the teacher where the model is.

    Args:
        teacher: from :func:`freeze`.
        model: the model that is attached now.

    Returns:
        The teacher, on the model's device.
    """
    if isinstance(teacher, nn.Module):
        return teacher.to(batches.device_of(model))
    own = exchange.values_of(model)
    return Shards({n: tensors.place_like(t, own.get(n, t)) for n, t in teacher.values.items()})


def tensors_of(teacher: Teacher) -> Tensors:
    """Return a teacher's parameters and persistent buffers under canonical names, tied ones once.

    Args:
        teacher: from :func:`freeze`.

    Returns:
        Names to detached tensors that share its memory.
    """
    if isinstance(teacher, Shards):
        return dict(teacher.values)
    out: Tensors = {}
    known: set[int] = set()
    for name, value in teacher.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in known:
            known.add(id(value))
            out[canonical(name)] = value.detach()
    return out


def rebuild(model: nn.Module, saved: Tensors, *, grown: bool) -> Teacher:
    """Return a teacher with saved tensors, built from the model that is attached now.

    Args:
        model: the attached model; a head may have grown since the state was saved.
        saved: names to tensors, from :func:`tensors_of`; whole ones do for a sharded model.
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
            target = targets[name]
            tensors.local(target).copy_(tensors.local(tensors.place_like(value, target)))
    return teacher


def classes_in(data: Iterable[Any], model: nn.Module) -> Tensor:
    """Return the sorted class numbers among the labels of some batches.

    Args:
        data: batches; under DDP and FSDP2 this process's part, and the answer is that of all.
        model: as the user passed it.

    Returns:
        ``[classes]``, int64, on the CPU.

    Raises:
        DataError: the labels are no class numbers, or there are none.
    """
    found: set[int] = set()
    for batch in data:
        labels = batches.labels_of(batch)
        if labels.is_floating_point() or labels.is_complex():
            raise DataError(
                f"labels of type {labels.dtype} are no class numbers, so there are no old classes: "
                "distil features (gw.FeatureDistillation) instead"
            )
        found.update(labels.detach().unique().tolist())
    classes = sorted(c for c in processes.everyones(found, model) if c >= 0)  # -100: no label
    if classes:
        return torch.tensor(classes)
    raise DataError(
        "the data to consolidate has no labels: pass a list or a DataLoader of the task's batches, "
        "not an iterator that was used up"
    )
