"""Hidden states of a model's blocks: which modules they come out of, and what is padding in them."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guywire.core.errors import DataError, SelectionError, UsageError
from guywire.core.selection import canonical
from guywire.methods.adapters._lora import Site

__all__ = [
    "Consistency",
    "blocks",
    "check_consistency",
    "hidden_state_loss",
    "listen",
    "token_mask",
]

Consistency = Literal["mse", "one_sided"]

_LISTS = (nn.ModuleList, nn.Sequential)


def hidden_state_loss(
    fast: Tensor, slow: Tensor, mask: Tensor | None = None, *, consistency: Consistency = "mse"
) -> Tensor:
    """Return the mean squared distance of two hidden states over tokens and features.

    Args:
        fast: ``[batch, length, width]``, or any shape without a mask.
        slow: the same shape; gets no gradient.
        mask: ``[batch, length]``, zero where padding is.
        consistency: ``mse``; or ``one_sided``, only where the fast one is too small:
            ``relu(slow - fast)^2``, the authors' code.

    Returns:
        A 0-d tensor in at least float32.

    Raises:
        DataError: the shapes differ.
        UsageError: there is no such consistency.

    Example:
        >>> fast, slow = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> hidden_state_loss(fast, slow), hidden_state_loss(fast, slow, consistency="one_sided")
        (tensor(5.), tensor(0.5000))
    """
    check_consistency(consistency)
    if fast.shape != slow.shape:
        raise DataError(f"hidden states of shapes {tuple(fast.shape)} and {tuple(slow.shape)}")
    wide = torch.promote_types(fast.dtype, torch.float32)
    difference = slow.detach().to(wide) - fast.to(wide)
    if consistency == "one_sided":
        difference = difference.relu()
    if mask is None:
        return difference.square().mean()
    # Filled before it is squared: what stands in padding may be NaN, and so would its gradient be.
    kept = difference.masked_fill(~mask.to(torch.bool).unsqueeze(-1), 0.0)
    return kept.square().sum() / (mask.sum().clamp(min=1) * difference.shape[-1])


def blocks(
    model: nn.Module, adapted: Sequence[Site], layers: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Return the modules whose outputs are the hidden states.

    Args:
        model: the model.
        adapted: its LoRA sites.
        layers: globs over names of modules; by default the items of every outermost list of blocks
            that has adapters inside, from the first such item on (before it nothing can differ).
            Where adapters stand in no block, the adapted layers themselves.

    Returns:
        Canonical names to modules, in the order of the model.

    Raises:
        SelectionError: a glob matches no module.
    """
    modules = {canonical(name): module for name, module in model.named_modules()}
    if layers is not None:
        found: dict[str, nn.Module] = {}
        for glob in layers:
            hits = {name: m for name, m in modules.items() if name and fnmatchcase(name, glob)}
            if not hits:
                near = difflib.get_close_matches(glob, modules, 3, 0.3) or list(modules)[1:4]
                raise SelectionError(
                    f"layers has {glob!r}, which matches no module; near misses: {', '.join(near)}"
                )
            found |= hits
        return {name: module for name, module in modules.items() if name in found}
    chosen: dict[str, None] = {}
    for site in adapted:
        block = _block_of(site.name, modules)
        if block is None:
            chosen[site.name] = None
            continue
        parent, _, first = block.rpartition(".")
        siblings = list(modules[parent]._modules)
        for child in siblings[siblings.index(first) :]:
            chosen[f"{parent}.{child}" if parent else child] = None
    return {name: module for name, module in modules.items() if name in chosen}


@contextlib.contextmanager
def listen(
    modules: Mapping[str, nn.Module], heard: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call a function with the output of each module, in the order in which they run.

    Args:
        modules: names to modules.
        heard: gets the name and the first tensor of the output.

    Yields:
        Nothing.
    """

    def hook(name: str) -> Callable[..., None]:
        def call(module: nn.Module, args: Any, output: Any) -> None:
            value = output
            while isinstance(value, tuple | list) and value:
                value = value[0]
            if not isinstance(value, Tensor):
                value = getattr(value, "last_hidden_state", None)
            if not isinstance(value, Tensor):
                raise DataError(
                    f"{name!r} returns a {type(output).__name__} without a tensor: name other "
                    "layers= whose outputs are hidden states"
                )
            heard(name, value)

        return call

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def token_mask(model: nn.Module, name: str, batch: Any, states: Tensor) -> Tensor | None:
    """Return which positions of a hidden state hold tokens.

    Args:
        model: the model.
        name: of the module that the state came out of.
        batch: what went into the model.
        states: ``[batch, length, width]``; other shapes have no padding that we know of.

    Returns:
        ``[batch, length]`` bool, or ``None`` if nothing is padded.
    """
    if not isinstance(batch, Mapping) or states.dim() != 3:
        return None
    mask = batch.get("attention_mask")
    two_sided = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if two_sided and "decoder" in name.split("."):
        mask = batch.get("decoder_attention_mask")
        labels = batch.get("labels")
        if mask is None and isinstance(labels, Tensor):
            mask = labels != -100
    if not isinstance(mask, Tensor) or mask.shape != states.shape[:2]:
        return None
    return mask.to(torch.bool)


def check_consistency(consistency: str) -> None:
    """Refuse what is neither form of the loss.

    Args:
        consistency: ``mse`` or ``one_sided``.

    Raises:
        UsageError: it is neither.
    """
    if consistency not in ("mse", "one_sided"):
        raise UsageError(f"consistency={consistency!r} is neither 'mse' nor 'one_sided'")


def _block_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The outermost item of a list that has this layer inside; not the layer itself."""
    parts = name.split(".")
    for depth in range(len(parts) - 1):
        if isinstance(modules[".".join(parts[:depth])], _LISTS):
            return ".".join(parts[: depth + 1])
    return None
