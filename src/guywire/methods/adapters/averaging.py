"""Averages of adapters: a second set of values for trainable parameters, and how it takes their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from guywire.core.errors import AttachError, UsageError
from guywire.core.exchange import exchanged, values_of
from guywire.core.processes import is_sharded
from guywire.core.tensors import Tensors, local

__all__ = [
    "average_into",
    "check_decay",
    "copy_into",
    "decay_at",
    "interpolate_adapters",
    "slow_copy",
    "swapped",
]


def interpolate_adapters(slow: Tensors, fast: Tensors, decay: float) -> Tensors:
    """Return ``decay * slow + (1 - decay) * fast`` of two adapters, factor by factor.

    The update ``B A`` of the result is not the interpolation of the two updates: it differs by
    ``decay (1 - decay) (B_slow - B_fast)(A_slow - A_fast)``.

    Args:
        slow: names to tensors.
        fast: the same names and shapes.
        decay: weight of ``slow``; 0 gives ``fast`` and 1 gives ``slow`` bit for bit.

    Returns:
        New tensors, in the types of ``slow``.

    Raises:
        UsageError: names or shapes differ, or the weight lies outside 0 to 1.

    Example:
        >>> interpolate_adapters({"A": torch.zeros(2)}, {"A": torch.ones(2)}, 0.25)
        {'A': tensor([0.7500, 0.7500])}
    """
    check_decay(decay)
    if {n: t.shape for n, t in slow.items()} != {n: t.shape for n, t in fast.items()}:
        raise UsageError("two adapters of different names or shapes have nothing in between")
    out = {name: value.detach().clone() for name, value in slow.items()}
    average_into(list(out.values()), [fast[name] for name in out], decay)
    return out


def decay_at(update: int, decay: float, *, warm_up: bool = True) -> float:
    """Return the weight of the old slow value at an update.

    With the warm-up it is ``min(1 - 1/(update + 1), decay)``: a plain mean of the start and all
    values so far until the horizon is full, as in the mean teacher's code.

    Args:
        update: 1 for the first.
        decay: in the long run.
        warm_up: grow up to it.

    Returns:
        The weight.

    Example:
        >>> [round(decay_at(k, 0.7), 2) for k in (1, 2, 3)]
        [0.5, 0.67, 0.7]
    """
    return min(1.0 - 1.0 / (update + 1), decay) if warm_up else decay


def slow_copy(parameter: Tensor) -> Tensor:
    """Return a detached copy in at least float32: bfloat16 loses small steps of an average.

    Args:
        parameter: any.

    Returns:
        The copy.
    """
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(wide, copy=True)


@contextlib.contextmanager
def swapped(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other values in the place of parameters.

    The parameters themselves, and with them the optimiser, graphs, hooks and ``requires_grad``, are
    put aside and come back; no parameter's own memory is written. Sharded ones cannot be put aside:
    their shards trade places with a copy of the values.

    Args:
        model: unwrapped.
        values: canonical names to tensors.

    Yields:
        Nothing.

    Raises:
        AttachError: the model lacks one of the names, or has it in another shape.
    """
    own = _matching(model, values)
    if is_sharded(model):
        with exchanged(model, {n: values[n].to(p.dtype, copy=True) for n, p in own.items()}):
            yield
        return
    places: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    stand_in = {
        id(p): nn.Parameter(values[name].to(device=p.device, dtype=p.dtype), requires_grad=False)
        for name, p in own.items()
    }
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None and id(p) in stand_in:
                places.append((module._parameters, key, p))
    try:
        for table, key, p in places:
            table[key] = stand_in[id(p)]
        yield
    finally:
        for table, key, p in places:
            table[key] = p


def copy_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into the parameters of their names.

    Args:
        model: unwrapped.
        values: canonical names to tensors.

    Raises:
        AttachError: the model lacks one of the names, or has it in another shape.
    """
    with torch.no_grad():
        for name, p in _matching(model, values).items():
            local(p).copy_(local(values[name]))


def average_into(slow: Sequence[Tensor], fast: Sequence[Tensor], decay: float) -> None:
    """Move each slow tensor towards its fast one: ``decay * slow + (1 - decay) * fast``, in place.

    Args:
        slow: changed in place.
        fast: of the same shapes, any floating type.
        decay: weight of the old slow value.
    """
    own = [local(s) for s in slow]
    wide = [local(f).to(s.dtype) for s, f in zip(own, fast, strict=True)]
    torch._foreach_lerp_(own, wide, 1.0 - decay)


def check_decay(decay: float) -> None:
    """Refuse a weight outside 0 to 1.

    Args:
        decay: weight of the old slow value.

    Raises:
        UsageError: it lies outside.
    """
    if not 0.0 <= decay <= 1.0:
        raise UsageError(
            f"decay={decay} must lie between 0 and 1: it is the weight of the old slow value"
        )


def _matching(model: nn.Module, values: Mapping[str, Tensor]) -> Tensors:
    own = values_of(model)
    for name, value in values.items():
        if name not in own:
            raise AttachError(
                f"the model has no parameter {name!r}, of which there is a slow value: give the "
                "model that was trained"
            )
        if own[name].shape != value.shape:
            raise AttachError(
                f"{name!r} is {tuple(own[name].shape)} in the model but {tuple(value.shape)} in the "
                "slow adapter: give the model that was trained"
            )
    return {name: own[name] for name in values}
