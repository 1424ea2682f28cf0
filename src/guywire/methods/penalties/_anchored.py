"""What penalties towards an anchor share: binding, strengths, and where the pull goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from guywire.core import selection, tensors
from guywire.core.errors import AttachError, CheckpointError, SelectionError, UsageError
from guywire.core.regularizer import Step, Strength, strength_at
from guywire.core.shelf import Item, Shelf
from guywire.core.tensors import Tensors

Strengths = Strength | Mapping[str, Strength]
Anchor = Literal["previous", "initial", "zero"] | Mapping[str, Tensor]


class Binding:
    """The selected parameters of one model, each with its strength, and the pull on them."""

    def __init__(self) -> None:
        self.params: dict[str, nn.Parameter] = {}
        self.strengths: dict[str, Strength] = {}
        self.number = 0

    def bind(self, model: nn.Module, select: selection.Selection, strength: Strengths) -> None:
        """Select the parameters to hold, and give each its strength.

        Args:
            model: the user's module.
            select: which parameters.
            strength: one strength, or globs to strengths, of which the first that matches decides;
                parameters that none matches are let be.

        Raises:
            SelectionError: the selection, or a glob among the strengths, matches nothing.
        """
        params = selection.select(model, select)
        if not isinstance(strength, Mapping):
            strength_at(strength, 0)
            self.params, self.strengths = params, dict.fromkeys(params, strength)
            return
        chosen: dict[str, Strength] = {}
        for glob, value in strength.items():
            strength_at(value, 0)
            matched = selection.select(model, glob).keys() & params.keys()
            if not matched:
                raise SelectionError(
                    f"the strength for {glob!r} lies outside the selection {select!r}"
                )
            chosen = dict.fromkeys(matched, value) | chosen
        self.params = {name: p for name, p in params.items() if name in chosen}
        self.strengths = chosen

    def release(self) -> None:
        """Let go of the model."""
        self.params, self.strengths = {}, {}

    def strength(self, name: str) -> float:
        """Return the strength of one parameter now.

        Args:
            name: the parameter's name.

        Returns:
            The strength.
        """
        return strength_at(self.strengths[name], self.number)

    def apply(
        self,
        step: Step,
        anchors: Tensors | None,
        precisions: Tensors | None,
        *,
        factor: float,
        decoupled: bool,
        sign: bool = False,
    ) -> None:
        """Pull: on the gradients, or, decoupled, on the parameters as AdamW's decay does.

        Args:
            step: the step that is about to happen.
            anchors: names to anchors; parameters without one are let be; ``None`` is zero for all.
            precisions: names to weights of the quadratic; ``None`` is one everywhere.
            factor: of the pull: ``factor * strength * precision * (param - anchor)``.
            decoupled: move the parameters by learning rate times pull.
            sign: pull by the sign of the distance, not the distance.
        """
        self.number = step.number
        if step.skipped or (decoupled and step.evaluation > 0):
            return
        rows = [
            (name, p, factor * strength)
            for name, p in self.params.items()
            if (anchors is None or name in anchors)
            and (strength := self.strength(name)) > 0.0
            and step.owns(p)
            and p.requires_grad
        ]
        params = [tensors.local(p) for _, p, _ in rows]
        held = [None if anchors is None else tensors.local(anchors[n]) for n, _, _ in rows]
        weights = None if precisions is None else [tensors.local(precisions[n]) for n, _, _ in rows]
        if decoupled:
            rates = [s * step.lr(p) for _, p, s in rows]
            if sign:
                tensors.shrink_towards(params, held, rates)
            else:
                tensors.pull_towards(params, held, rates, weights)
            return
        grads = [gradient(name, p) for name, p, _ in rows]
        scales = [s * step.scale for _, _, s in rows]
        if sign:
            tensors.add_sign(grads, params, held, scales)
        else:
            tensors.add_pull(grads, params, held, scales, weights)

    def value(
        self, anchors: Tensors | None, precisions: Tensors | None, *, power: int = 2
    ) -> Tensor | None:
        """Return the sum of ``strength * precision * |param - anchor|^power``.

        Args:
            anchors: as in :meth:`apply`.
            precisions: as in :meth:`apply`.
            power: 1 or 2.

        Returns:
            A 0-d tensor, or ``None`` if nothing is held.
        """
        parts = []
        for name, p in self.params.items():
            if anchors is not None and name not in anchors:
                continue
            anchor = None if anchors is None else tensors.local(anchors[name])
            weight = None if precisions is None else tensors.local(precisions[name])
            distance = tensors.distance(tensors.local(p), anchor, weight, power=power)
            parts.append((p, self.strength(name) * distance))
        return tensors.reduce_shards(parts)


def anchors_at_setup(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    anchor: Anchor,
    learnt: Tensors | None,
    dtype: torch.dtype | None,
    shelf: Shelf,
) -> Tensors | None:
    """Return the anchors at attach: those learnt before, or the first ones.

    Given tensors may name more than is selected (a whole state dict, say), but nothing that the
    model lacks.

    Args:
        model: the user's module.
        params: the parameters held.
        anchor: the rule, or names to tensors.
        learnt: anchors from before, if any.
        dtype: of the anchors; each parameter's own if ``None``.
        shelf: where they are kept.

    Returns:
        Names to anchors; ``None`` for zero.

    Raises:
        AttachError: what was learnt belongs to another model.
        UsageError: the rule is unknown, or given tensors do not fit.
    """
    if isinstance(anchor, Mapping):
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        unknown = sorted(anchor.keys() - {selection.canonical(name) for name, _ in named})
        given = {n: t if dtype is None else t.to(dtype) for n, t in anchor.items() if n in params}
        if unknown or not given:
            what = (
                f"names {unknown[0]!r}, which the model lacks" if unknown else "names none of them"
            )
            raise UsageError(
                f"the anchor for {len(params)} selected parameters {what}: give tensors under the "
                "names of named_parameters()"
            )
        check_shapes(params, given, "the given anchor")
        return like(given, params, shelf)
    if anchor not in ("previous", "initial", "zero"):
        raise UsageError(
            f"anchor={anchor!r} is none of 'previous', 'initial', 'zero' or a mapping of tensors"
        )
    if anchor == "zero":
        return None
    if learnt is None:
        return anchors_now(params, dtype, shelf)
    if not learnt.keys() & params.keys():
        raise AttachError(
            "this regularizer learnt from another model (none of its parameters is here): "
            "make a new one"
        )
    check_shapes(params, learnt, "the anchor")
    return placed(learnt, params, shelf)


def anchors_now(
    params: Mapping[str, nn.Parameter], dtype: torch.dtype | None, shelf: Shelf
) -> Tensors:
    """Return where parameters are now, as anchors.

    Args:
        params: names to parameters.
        dtype: of the anchors; each parameter's own if ``None``.
        shelf: where they are kept.

    Returns:
        Copies.
    """
    return shelf.put({name: Item(p, dtype or p.dtype, lambda p=p: p) for name, p in params.items()})


def placed(learnt: Tensors, params: Mapping[str, nn.Parameter], shelf: Shelf) -> Tensors:
    """Return tensors learnt before, on the devices and the shards of their parameters.

    Args:
        learnt: names to tensors.
        params: names to parameters; tensors of names that are not here stay where they are.
        shelf: where they are kept.

    Returns:
        The tensors themselves where they are in place already.
    """
    if shelf.keep is None:
        found = {n: tensors.place_like(t, params[n]) for n, t in learnt.items() if n in params}
        return learnt | found
    if all(shelf.holds(t, params[n]) for n, t in learnt.items() if n in params):
        return learnt
    return like(learnt, params, shelf)


def check_shapes(params: Mapping[str, nn.Parameter], held: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that do not fit the parameters they belong to.

    Args:
        params: names to parameters.
        held: names to tensors; names that the model lacks are let be.
        what: what they are, for the message.

    Raises:
        CheckpointError: a shape differs.
    """
    for name, p in params.items():
        if name in held and held[name].shape != p.shape:
            raise CheckpointError(
                f"{what} of {name!r} has the shape {tuple(held[name].shape)}, the parameter "
                f"{tuple(p.shape)}: give new rows a parameter of their own, or make a new regularizer"
            )


def like(saved: Mapping[str, Tensor], params: Mapping[str, nn.Parameter], shelf: Shelf) -> Tensors:
    """Copy saved tensors to the devices, and the shards, of the parameters they belong to.

    Args:
        saved: names to tensors.
        params: names to parameters; tensors of names that are not here stay where they are.
        shelf: where they are kept.

    Returns:
        Copies.
    """
    items = {}
    for name, t in saved.items():
        p = params.get(name)
        if p is None:
            items[name] = Item(t, t.dtype, lambda t=t: t)
        else:
            items[name] = Item(p, t.dtype, lambda t=t, p=p: tensors.place_like(t, p))
    return shelf.put(items)


def gradient(name: str, parameter: nn.Parameter) -> Tensor:
    """Return the local part of a parameter's gradient, making a zero one where there is none.

    Args:
        name: the parameter's name, for the message.
        parameter: a parameter.

    Returns:
        The gradient, to be changed in place.

    Raises:
        UsageError: the gradient is sparse.
    """
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.is_sparse:
        raise UsageError(
            f"{name!r} has a sparse gradient, and a penalty pulls everywhere: build the embedding "
            "with sparse=False, or leave it out of the selection"
        )
    return tensors.local(parameter.grad)
