"""What attaching needs to know about optimisers, frames and FSDP2."""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
from torch import nn

Fingerprint = dict[str, tuple[Any, ...]]


def innermost(optimizer: Any) -> Any:
    """Return the optimiser inside Accelerate's, Lightning's and other wrappers."""
    # Accelerate's and Lightning's wrappers, and ZeRO-style ones, keep the real one inside.
    for _ in range(8):
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            return optimizer
        optimizer = inner
    return optimizer


def find_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the closure that a step got, and how to put another in its place."""
    # args[0] is the optimiser itself.
    if kwargs.get("closure") is not None:
        return kwargs["closure"], lambda new: (args, {**kwargs, "closure": new})
    if len(args) > 1 and callable(args[1]):
        return args[1], lambda new: ((args[0], new, *args[2:]), kwargs)
    return None, None


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return what must not change between steps: identity, shape and device by name."""
    return {name: (id(p), tuple(p.shape), p.device) for name, p in model.named_parameters()}


def change(known: Fingerprint, now: Fingerprint) -> str:
    """Say in words what happened to the first parameter that changed."""
    for name in sorted(known.keys() | now.keys()):
        was, new = known.get(name), now.get(name)
        if was == new:
            continue
        if was is None:
            return f"parameter {name!r} appeared"
        if new is None:
            return f"parameter {name!r} vanished"
        if was[1:] == new[1:]:
            return f"parameter {name!r} was replaced by another tensor"
        before, after = (f"shape {shape} on {device}" for _, shape, device in (was, new))
        return f"parameter {name!r} changed from {before} to {after}"
    return "nothing changed"


def is_fsdp(module: nn.Module) -> bool:
    """Tell whether ``fully_shard`` was called on this very module."""
    return hasattr(module, "reshard") and hasattr(module, "set_requires_gradient_sync")


def reshard(model: nn.Module) -> None:
    """Bring FSDP2's parameters back to their shards."""
    # After a forward pass without a backward one, FSDP2 leaves the root module's parameters whole;
    # the optimiser holds the shards.
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # pyright: ignore[reportCallIssue]


def is_above(frame: FrameType, below: FrameType | None) -> bool:
    """Tell whether one frame is among the callers of another, or is it."""
    while below is not None:
        if below is frame:
            return True
        below = below.f_back
    return False


def only_for_show(frame: FrameType | None) -> bool:
    """Tell whether a step is the one, at rate zero, that makes an optimiser's state appear."""
    # torch.distributed.checkpoint.state_dict.get_state_dict calls it on a fresh optimiser. It is no
    # step of the training, and what is loaded afterwards replaces the moments that it leaves.
    for _ in range(8):
        if frame is None:
            return False
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False
