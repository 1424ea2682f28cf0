"""Let other values take the place of a model's own for a pass, where a copy of it cannot be made.

Modules that ``fully_shard`` (FSDP2) has treated cannot be copied, so a second set of values (a
teacher's, a slow adapter's) has no model of its own to live in. Its shards trade places with the
model's: what FSDP2 gathers then is the other set. Each process trades its own shards, so that
nothing is communicated, and no third set is held.

A gradient that enters such a model at a layer inside must come through its outputs as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from guywire.core import _stepping, tensors
from guywire.core.errors import AttachError
from guywire.core.selection import canonical, named_parameters
from guywire.core.tensors import Tensors

__all__ = ["exchanged", "through", "values_of"]


def values_of(model: nn.Module) -> Tensors:
    """Return a model's parameters and persistent buffers, tied ones once; sharded ones as shards.

    Args:
        model: unwrapped; parameters that FSDP2 left gathered are put back to their shards.

    Returns:
        Canonical names to the tensors themselves.
    """
    _stepping.reshard(model)
    out: Tensors = dict(named_parameters(model))
    passing = {
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        for key in module._non_persistent_buffers_set
    }
    buffers = model.named_buffers()  # tied ones once
    return out | {canonical(name): b for name, b in buffers if name not in passing}


@contextmanager
def exchanged(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Trade a model's values for others; on leaving, both are back where they were, bit for bit.

    Meanwhile ``values`` holds the model's. Graphs that were made before stay good, and under FSDP2
    a backward pass gathers its parameters anew. Every process must run the same passes within.

    Args:
        model: unwrapped; sharded, or not.
        values: canonical names of parameters or buffers to tensors, sharded and typed as those.

    Yields:
        Nothing.

    Raises:
        AttachError: the model lacks a name, or has it in another shape or type.
    """
    pairs = _pairs(values_of(model), values)
    traded: list[tuple[Tensor, Tensor]] = []
    try:
        for mine, theirs in pairs:  # one may find no memory
            _trade(mine, theirs)
            traded.append((mine, theirs))
        yield
    finally:
        _stepping.reshard(model)  # FSDP2 would keep some of the pass's parameters gathered
        for mine, theirs in traded:
            _trade(mine, theirs)


def through(value: Tensor, outputs: Any) -> Tensor:
    """Return a value of a pass inside a model, with a backward pass that starts at its outputs.

    FSDP2 gathers parameters where a gradient reaches the outputs of their module. One that entered
    at a layer inside, alone, would meet parameters whose memory was freed: a crash, not an error.

    Args:
        value: any tensor with a graph.
        outputs: of that pass: a tensor, or a tree of tensors.

    Returns:
        The same numbers; the first of the outputs with a graph gets a gradient of zeros.
    """
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            return _Through.apply(value, leaf)  # pyright: ignore[reportReturnType]
    return value


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, output: Tensor) -> Tensor:
        ctx.shape, ctx.zero = output.shape, output.new_zeros(())
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], ctx.zero.expand(ctx.shape)


def _pairs(own: Tensors, values: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for name, value in values.items():
        if name not in own:
            raise AttachError(
                f"the model has no {name!r}, of which there are other values: attach the model that "
                "was trained"
            )
        # Not .detach(): a write through .data is no change to a graph that saved the tensor, and by
        # the time that graph is used the tensor is what it was.
        mine, theirs = tensors.local(own[name]).data, tensors.local(value).data
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise AttachError(
                f"{name!r} is {tuple(mine.shape)} of {mine.dtype} in the model and "
                f"{tuple(theirs.shape)} of {theirs.dtype} elsewhere: attach the model that was trained"
            )
        pairs.append((mine, theirs))
    return pairs


def _trade(mine: Tensor, theirs: Tensor) -> None:
    held = mine.clone()
    mine.copy_(theirs)
    theirs.copy_(held)
