"""Run a model aside: without leaving traces in it, in the random state, or in what hooks listen to.

Diagnostics, replay and projections run the user's model more often than the user's loop does. The
two context managers here keep those runs from being noticed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guywire.core.batches import device_of

__all__ = ["aside", "is_aside", "is_listener", "listener", "random_state_kept", "undisturbed"]

# A plain module global, not a ContextVar: torch.compile can read it inside a traced hook.
_depth = 0

_LISTENER = "_guywire_listener"


def is_aside() -> bool:
    """Tell whether the present forward pass is one of our own, not the user's.

    Returns:
        True inside :func:`aside` or :func:`undisturbed`.
    """
    return _depth > 0


def listener(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a forward hook that listens to the user's own passes: copies of a model go without it.

    Args:
        hook: a function. Not a bound method, of which ``copy.deepcopy`` would copy the object.

    Returns:
        The hook.
    """
    setattr(hook, _LISTENER, True)
    return hook


def is_listener(hook: Callable[..., Any]) -> bool:
    """Tell whether a hook was marked by :func:`listener`.

    Args:
        hook: any.

    Returns:
        The answer.
    """
    return hasattr(hook, _LISTENER)


@contextmanager
def aside() -> Iterator[None]:
    """Run forward passes that our capturing hooks must not listen to.

    Yields:
        Nothing.

    Example:
        >>> with aside():
        ...     is_aside()
        True
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Put the global random states (Python, numpy, torch) back as they were.

    Args:
        device: whose generator to keep besides the CPU's.

    Yields:
        Nothing.
    """
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    cpu = torch.get_rng_state()
    module = None
    if device is not None and device.type != "cpu":
        module = getattr(torch, device.type, None)
    there = None if module is None else module.get_rng_state(device)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if module is not None:
            module.set_rng_state(there, device)


@contextmanager
def undisturbed(model: nn.Module, *, mode: bool | None = None) -> Iterator[None]:
    """Run a model and leave no trace: train flags, buffers and random states come back.

    Args:
        model: any module.
        mode: set this train flag on all its modules meanwhile; ``None`` keeps each module's own.

    Yields:
        Nothing.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with undisturbed(norm):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(owner, name, b) for owner in model.modules() for name, b in _own_buffers(owner)]
    copies = [b.detach().clone() for _, _, b in buffers]
    with random_state_kept(device_of(model)), aside():
        try:
            if mode is not None:
                # Not model.train(mode): one that was overridden may do more than set flags, and
                # what it does would not be undone.
                for module, _ in flags:
                    module.training = mode
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            for (owner, name, buffer), copy in zip(buffers, copies, strict=True):
                if owner._buffers.get(name) is not buffer:
                    owner._buffers[name] = buffer
                # Written only where it changed: a needless write would look, to autograd, like a
                # change under the user's graph.
                if not torch.equal(buffer.detach(), copy):
                    with torch.no_grad():
                        buffer.copy_(copy)


def _own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, b) for name, b in module._buffers.items() if b is not None]
