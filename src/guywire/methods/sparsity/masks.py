"""Masks on weights: which weights of a frozen network are on, learnt by real scores.

    effective weight = b * W,     b = 1 where m > a, else 0

W: the frozen weight; m: one real score a weight; a: the threshold. The step function counts as the
identity in the backward pass (a straight-through estimator), so dL/dm = dL/d(b W) * W. Scores begin
above the threshold: everything is on, and the model computes what it computed before.

A mask is a parametrisation (``torch.nn.utils.parametrize``), so it works in any module that reads
its weight as an attribute: linear layers, convolutions, and ``nn.MultiheadAttention`` with its fused
projection. Its scores are parameters called ``<layer>.parametrizations.weight.0.scores``.

Source: Zheng et al., "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained
Vision-Language Models", arXiv 2307.15049; the masking layer is Piggyback's, arXiv 1801.06519.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from guywire.core import selection
from guywire.core.errors import SelectionError, UsageError
from guywire.core.selection import Selection, canonical, unwrap

__all__ = ["Mask", "fold_mask", "mask", "masked_weights", "masks_of", "unmask", "unmasked"]

# Last parts of the names that attention projections and patch embeddings go by.
_PROJECTIONS = frozenset(
    ["q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "query", "key", "value", "qkv"]
)
_ENDS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "attention.output.dense.weight",
    "attn.proj.weight",
    "patch_embedding.weight",
    "patch_embeddings.projection.weight",
    "patch_embed.proj.weight",
    "visual.conv1.weight",
)
_IMAGE_TOWERS = frozenset(("vision_model", "visual"))
_TEXT_TOWERS = frozenset(("text_model",))


def mask(
    model: nn.Module,
    select: Selection = None,
    *,
    init: float = 0.01,
    threshold: float = 5e-3,
    freeze: bool = True,
) -> dict[str, nn.Parameter]:
    """Put a mask on weights of a model, in place; at first every weight is on.

    Give the scores to an optimiser without weight decay, which would pull them below the threshold.

    Args:
        model: any module; frozen weights can be masked.
        select: which weights, see :func:`guywire.select`; by default the attention projections (q,
            k, v, out) and the patch embedding, of the image tower where there are two towers.
        init: first value of every score, above the threshold.
        threshold: a weight is on while its score is greater.
        freeze: set ``requires_grad=False`` on everything but the scores.

    Returns:
        Names of the masked weights to their scores: float32 at least, of the weights' shapes.

    Raises:
        SelectionError: nothing is selected, or what is selected is masked already, parametrised
            otherwise, or shared by several modules.
        UsageError: ``init`` does not lie above ``threshold``.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> (scores,) = mask(model, "weight").values()
        >>> scores
        Parameter containing:
        tensor([[0.0100, 0.0100]], requires_grad=True)
        >>> with torch.no_grad():
        ...     scores[0, 1] = 0.0
        >>> bool(model.weight[0, 1] == 0.0)
        True
    """
    if not (math.isfinite(init) and math.isfinite(threshold) and init > threshold):
        raise UsageError(
            f"init={init} must lie above threshold={threshold}: the mask starts with all weights on"
        )
    inner = unwrap(model)
    chosen = _select(inner, select)
    owners = _owners(inner)
    for name, weight in chosen.items():
        if len(owners[id(weight)]) > 1:
            raise SelectionError(
                f"{name!r} is shared by several modules, and a mask would act in one only: "
                "leave it out of the selection"
            )
        if isinstance(owners[id(weight)][0][0], parametrize.ParametrizationList | Mask):
            raise SelectionError(
                f"{name!r} belongs to a weight that is masked or parametrised already: "
                "unmask() it first, or leave it out of the selection"
            )
        if not weight.is_floating_point():
            raise SelectionError(f"{name!r} is of type {weight.dtype}: mask real weights")
    if freeze:
        inner.requires_grad_(False)
    scores: dict[str, nn.Parameter] = {}
    for name, weight in chosen.items():
        module, attribute = owners[id(weight)][0]
        made = Mask(weight, init, threshold)
        parametrize.register_parametrization(module, attribute, made)
        scores[name] = made.scores
    return scores


class Mask(nn.Module):
    """The parametrisation of one weight; :func:`mask` makes it.

    Args:
        weight: what is masked.
        init: first value of the scores.
        threshold: a weight is on while its score is greater.
    """

    def __init__(self, weight: Tensor, init: float, threshold: float) -> None:
        super().__init__()
        # Scores move by some 1e-4 a step, which half precision would round away.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad():
            self.scores = nn.Parameter(torch.full_like(weight, init, dtype=dtype))
        self.threshold = threshold
        self.active = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the effective weight.

        Args:
            weight: the frozen one.

        Returns:
            Of the same shape and type: ``weight`` where the mask is on, else 0.
        """
        if not self.active:
            return weight
        on = (self.scores > self.threshold).to(self.scores.dtype)
        # The second term is zero, and gives the scores the gradient of the identity.
        return (weight * (on + (self.scores - self.scores.detach()))).to(weight.dtype)

    def on(self) -> Tensor:
        """Return which weights are on.

        Returns:
            A boolean tensor of the weight's shape.
        """
        return self.scores.detach() > self.threshold

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows.

        Returns:
            Shape and threshold.
        """
        return f"shape={tuple(self.scores.shape)}, threshold={self.threshold:g}"


def masked_weights(model: nn.Module) -> dict[str, Mask]:
    """Return the masks in a model.

    Args:
        model: any module.

    Returns:
        Canonical names of the weights, as they were before masking, to their masks.
    """
    return {name: found for name, _, _, found in _places(model)}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return which weights are on.

    Args:
        model: a masked model.

    Returns:
        Names of the weights to boolean tensors.

    Raises:
        SelectionError: the model has no masks.
    """
    found = masked_weights(model)
    if not found:
        raise SelectionError("the model has no masks: call gw.mask(model) first")
    return {name: one.on() for name, one in found.items()}


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """Run a masked model as the original, with every weight on.

    Args:
        model: a masked model.

    Yields:
        Nothing.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> scores = mask(model, "weight")["weight"]
        >>> with torch.no_grad(), unmasked(model):
        ...     _ = scores.zero_()
        ...     bool(model.weight == 0.0)
        False
    """
    flags = [(one, one.active) for one in masked_weights(model).values()]
    try:
        for one, _ in flags:
            one.active = False
        yield
    finally:
        for one, flag in flags:
            one.active = flag


def fold_mask(model: nn.Module) -> nn.Module:
    """Write ``b * W`` into the weights and remove the masks: the plain model again, at no cost.

    What was frozen stays frozen. The scores are gone: save the mask before, if you want it.

    Args:
        model: a masked model, changed in place.

    Returns:
        The model.

    Raises:
        SelectionError: the model has no masks.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> _ = mask(model, "weight")
        >>> type(fold_mask(model)) is nn.Linear
        True
    """
    return _remove(model, leave=True)


def unmask(model: nn.Module) -> nn.Module:
    """Remove the masks and leave the weights as they were before masking.

    Args:
        model: a masked model, changed in place.

    Returns:
        The model.

    Raises:
        SelectionError: the model has no masks.
    """
    return _remove(model, leave=False)


def _remove(model: nn.Module, *, leave: bool) -> nn.Module:
    places = list(_places(model))
    if not places:
        raise SelectionError("the model has no masks: there is nothing to remove")
    for name, module, attribute, found in places:
        chain: Any = module.parametrizations
        if len(chain[attribute]) > 1:
            raise SelectionError(
                f"{name!r} has another parametrisation beside its mask: remove that one first"
            )
        found.active = True
        _own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=leave)
    return model


def _own_class(module: nn.Module) -> None:
    """Give a module a class of its own.

    PyTorch keeps the property of a parametrised weight on the module's class, which a deep copy
    shares; removing it from there would break the other.
    """
    shared = type(module)
    body = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    own: Any = type(shared.__name__, shared.__bases__, body)
    module.__class__ = own


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Mask]]:
    for path, module in unwrap(model).named_modules():
        if not parametrize.is_parametrized(module):
            continue
        chains: Any = module.parametrizations
        for attribute, chain in chains.items():
            for one in chain:
                if isinstance(one, Mask):
                    name = canonical(f"{path}.{attribute}" if path else attribute)
                    yield name, module, attribute, one


def _select(model: nn.Module, rule: Selection) -> dict[str, nn.Parameter]:
    # A selection is of trainable parameters, and what is masked is usually frozen already.
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(p.is_floating_point())
        if rule is not None:
            return selection.select(model, rule)
        names = selection.named_parameters(model)
        chosen = {n: p for n, p in names.items() if _is_projection(n, _has_image_tower(model))}
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    if not chosen:
        raise SelectionError(
            "the model has no attention projections or patch embedding under a name that mask() "
            "knows: say which weights, with select="
        )
    return chosen


def _has_image_tower(model: nn.Module) -> bool:
    return any(name.split(".")[-1] in _IMAGE_TOWERS for name, _ in model.named_modules())


def _is_projection(name: str, two_towers: bool) -> bool:
    parts = name.split(".")
    if _TEXT_TOWERS & set(parts) or (two_towers and not _IMAGE_TOWERS & set(parts)):
        return False
    if len(parts) > 1 and parts[-1] == "weight" and parts[-2] in _PROJECTIONS:
        return True
    return any(name == end or name.endswith((f".{end}",)) for end in _ENDS)


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, p in module.named_parameters(recurse=False):
            found.setdefault(id(p), []).append((module, attribute))
    return found
