"""The arms by name: what is attached in each, and what may move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import guywire as gw
from guywire.core import losses
from guywire.core.selection import Selection
from guywire.lab.models import Classifier

__all__ = ["move_only", "regularizers"]

NONE = ("plain", "joint", "frozen")
"""Arms that attach nothing."""


def regularizers(
    arm: str, strength: float, *, held: Selection, memory: int, head: Literal["softmax", "sigmoid"]
) -> list[gw.Regularizer]:
    """Return what an arm attaches.

    Args:
        arm: ``plain``, ``joint``, ``frozen``, or terms of ``EWC``, ``L2``, ``FeatKD``, ``PredKD``,
            ``Replay`` joined by ``+``.
        strength: of the term. Beside another term prediction distillation has the weight 1 (it
            stands for the old classes' targets in the loss) and the other one has the strength.
        held: which parameters a penalty holds.
        memory: samples kept by replay.
        head: of the classifier.

    Returns:
        The regularizers.

    Raises:
        KeyError: there is no such term.

    Example:
        >>> regularizers("PredKD+L2", 0.5, held=None, memory=0, head="sigmoid")
        [PredictionDistillation(kind='sigmoid'), L2(strength=0.5)]
    """
    if arm in NONE:
        return []
    criterion = losses.cross_entropy if head == "softmax" else gw.sigmoid_cross_entropy
    makers = {
        "EWC": lambda c: gw.EWC(c, labels="true", select=held),
        "L2": lambda c: gw.L2(c, select=held),
        "FeatKD": lambda c: gw.FeatureDistillation(c, layer="backbone", at="output"),
        "PredKD": lambda c: gw.PredictionDistillation(c, kind=head),
        "Replay": lambda c: gw.Replay(memory, strength=c, buffer="balanced", criterion=criterion),
    }
    terms = arm.split("+")
    return [
        makers[term](1.0 if term == "PredKD" and len(terms) > 1 else strength) for term in terms
    ]


def move_only(model: Classifier, select: Sequence[str]) -> None:
    """Freeze a backbone but for what is selected; blocks that the head grows later are free.

    Args:
        model: a classifier whose head has no classes yet.
        select: globs; none freezes all.
    """
    model.requires_grad_(True)
    chosen = gw.select(model, list(select)).values() if select else []
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
