"""What SaRA learnt, without the model: a few values a tensor, to put on a pretrained model again.

An adaptation P of a pretrained P_0 is the values of the entries chosen at first, and the threshold
that chose them: the places follow from P_0, which whoever uses it has.

    P_0 + alpha (P - P_0)                                       with a strength
    P_0 + alpha_1 (P_1 - P_0) + alpha_2 (P_2 - P_0)             two of the same pretrained model

Source: Hu, Yi, Tao, Zhu, Chen, Zhang, Li, arXiv 2409.06633, section on applications.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, nn

from guywire.core import checkpoint, selection
from guywire.core.errors import CheckpointError, UsageError
from guywire.core.tensors import Tensors
from guywire.methods.sparsity import _vectors
from guywire.methods.sparsity.smallest import smallest_masks

__all__ = ["SaRAAdaptation", "sara_adapt", "sara_adaptation", "sara_fold"]

_KIND = "guywire-sara-1"


@dataclass(frozen=True)
class SaRAAdaptation:
    """Values of the entries that were trained.

    Attributes:
        values: names to vectors ``[k]`` of values, in row-major order of the entries.
        threshold: which pretrained entries they are; ``None`` if the masks were given.
        index: names to places of the entries, only where there is no threshold.
    """

    values: Tensors
    threshold: float | None
    index: Tensors = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file.

        Args:
            path: the file; its folder must exist.

        Raises:
            CheckpointError: it cannot be written.
        """
        tree = {"kind": _KIND, "threshold": self.threshold}
        checkpoint.save(path, {**tree, "values": dict(self.values), "index": dict(self.index)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SaRAAdaptation:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The adaptation.

        Raises:
            CheckpointError: the file is missing, damaged, or something else.
        """
        tree = checkpoint.load(path)
        if not isinstance(tree, dict) or tree.get("kind") != _KIND:
            raise CheckpointError(
                f"{path} holds no adaptation by SaRA: SaRAAdaptation.save writes one"
            )
        values, threshold, index = (tree.get(key) for key in ("values", "threshold", "index"))
        known = threshold is None or isinstance(threshold, float | int)
        if not (known and _tensors(values) and _tensors(index)):
            raise CheckpointError(
                f"the adaptation in {path} makes no sense: write it again with SaRAAdaptation.save"
            )
        return cls(values, threshold, index)


def _tensors(value: object) -> TypeGuard[Tensors]:
    return isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values())


def sara_adaptation(model: nn.Module) -> SaRAAdaptation:
    """Return what was learnt so far by a model that ``SaRA.prepare`` prepared.

    Args:
        model: before it is folded.

    Returns:
        The adaptation: as many values as entries were chosen at first, those settled half-way
        included.

    Raises:
        AttachError: the model is not prepared.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(4, 2)
        >>> _ = gw.SaRA(share=0.5).prepare(model)
        >>> sum(v.numel() for v in gw.sara_adaptation(model).values.values())
        5
    """
    vectors = _vectors.of(model)
    places = {name: vectors.first_choice(name) for name in vectors.names()}
    for name in vectors.names():
        vectors.write(name)
    return SaRAAdaptation(
        {name: _vectors.gather(vectors.weight(name), place) for name, place in places.items()},
        vectors.threshold,
        {} if vectors.threshold is not None else places,
    )


def sara_adapt(
    model: nn.Module,
    adaptations: SaRAAdaptation | Sequence[SaRAAdaptation],
    strengths: float | Sequence[float] = 1.0,
) -> nn.Module:
    """Put one or several adaptations on the pretrained model that they were trained from.

    Args:
        model: with the pretrained weights; changed in place.
        adaptations: one or several; what they changed is added up.
        strengths: one number each; 0 is the pretrained model, 1 the adapted one exactly.

    Returns:
        The model.

    Raises:
        CheckpointError: an adaptation is of another model.
        UsageError: there are not as many strengths as adaptations, or the model is prepared.

    Example:
        >>> import copy, guywire as gw
        >>> base = nn.Linear(4, 2)
        >>> tuned = copy.deepcopy(base)
        >>> for vector in gw.SaRA(share=0.5).prepare(tuned):
        ...     _ = vector.data.add_(1.0)
        >>> model = gw.sara_adapt(copy.deepcopy(base), gw.sara_adaptation(tuned), 0.6)
        >>> round(float((model.weight - base.weight).detach().max()), 4)
        0.6
    """
    several = [adaptations] if isinstance(adaptations, SaRAAdaptation) else list(adaptations)
    factors = [strengths] if isinstance(strengths, int | float) else list(strengths)
    if len(factors) != len(several) or not several:
        raise UsageError(f"{len(several)} adaptations, {len(factors)} strengths: give one for each")
    if _vectors.find(model) is not None:
        raise UsageError("the model is being trained by SaRA: fold it first, or take a fresh one")
    params: dict[str, nn.Parameter] = selection.named_parameters(model)
    # All places are found, and all checked, before anything changes.
    found = [_places(params, adaptation) for adaptation in several]
    with torch.no_grad():
        for name in dict.fromkeys(n for places in found for n in places):
            p = params[name]
            mine = [
                (f, a.values[name].to(p.device), places[name])
                for f, a, places in zip(factors, several, found, strict=True)
                if name in places
            ]
            if len(mine) == 1 and mine[0][0] == 1.0:
                _vectors.scatter(p, mine[0][2], mine[0][1])
                continue
            change = torch.zeros(p.shape, dtype=torch.float64, device=p.device)
            for factor, values, place in mine:
                old = _vectors.gather(p, place).double()
                delta = factor * (values.double() - old)
                change.put_(place.long(), delta, accumulate=True)
            p.copy_((p.double() + change).to(p.dtype))
    return model


def sara_fold(model: nn.Module) -> nn.Module:
    """Write the vectors into the weights and leave an ordinary model, trainable as before.

    Args:
        model: one that ``SaRA.prepare`` prepared; changed in place. Detach the wires first.

    Returns:
        The model.

    Raises:
        AttachError: it is not prepared.

    Example:
        >>> import guywire as gw
        >>> model = nn.Linear(3, 2)
        >>> _ = gw.SaRA(share=0.5).prepare(model)
        >>> [name for name, p in gw.sara_fold(model).named_parameters() if p.requires_grad]
        ['weight', 'bias']
    """
    _vectors.remove(model)
    return model


def _places(params: dict[str, nn.Parameter], adaptation: SaRAAdaptation) -> Tensors:
    """Return the places of an adaptation's values in this pretrained model."""
    missing = sorted(adaptation.values.keys() - params.keys())
    if missing:
        raise CheckpointError(
            f"the adaptation has values for {missing[0]!r}, which the model lacks: it was trained "
            "from another model"
        )
    places: Tensors = {}
    for name, values in adaptation.values.items():
        p = params[name]
        if adaptation.threshold is None:
            place = adaptation.index[name].to(p.device)
            fits = place.numel() == values.numel() and (
                not place.numel() or int(place.max()) < p.numel()
            )
        else:
            mask = smallest_masks({name: p}, adaptation.threshold)[name]
            place = mask.reshape(-1).nonzero().squeeze(1)
            fits = place.numel() == values.numel()
        if not fits:
            raise CheckpointError(
                f"the adaptation has {values.numel()} values for {name!r}, but {place.numel()} of "
                "the model's entries are small: these are not the pretrained weights that it was "
                "trained from"
            )
        places[name] = place
    return places
