"""Run a model without leaving a trace: flags, hooks and global switches come back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from guywire.core.processes import is_sharded

__all__ = ["quiet"]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode with all parameters frozen, and back at the end.

    Frozen parameters are what keeps plain weight gradients from being computed. Training flags are
    set as attributes: some layers' own ``train()`` does more (merging adapters, say).

    Args:
        model: the unwrapped model.

    Yields:
        Nothing.
    """
    modules = list(model.modules())
    training = [(m, m.training) for m in modules]
    wanted: dict[int, tuple[nn.Parameter, bool]] = {}

    def freeze(module: nn.Module, *_: Any) -> None:
        for p in module._parameters.values():
            if p is not None:
                wanted.setdefault(id(p), (p, p.requires_grad))
                p.requires_grad_(False)

    handles = []
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_no_fast_path())
        stack.enter_context(_eager(modules))
        try:
            for m in modules:
                m.training = False
                freeze(m)
            if is_sharded(model):
                # FSDP2 swaps the gathered parameters in before a forward pass; they have flags of
                # their own.
                handles = [m.register_forward_pre_hook(freeze) for m in modules if m._parameters]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for p, flag in wanted.values():
                p.requires_grad_(flag)
            for m, flag in training:
                m.training = flag


@contextmanager
def _no_fast_path() -> Iterator[None]:
    # The fused inference path of nn.TransformerEncoderLayer calls none of its layers.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _eager(modules: list[nn.Module]) -> Iterator[None]:
    # Compiled code does not see hooks that were added after it was compiled.
    compiled = any(
        getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod")
        for m in modules
    )
    stance = getattr(torch.compiler, "set_stance", None) if compiled else None
    if stance is None:
        yield
    else:
        with stance("force_eager"):
            yield
