"""The claims, each with its rule, written before the numbers existed. Accuracies are fractions."""

from __future__ import annotations

from guywire.lab.studies.statistics import Table, bootstrap
from guywire.lab.studies.study import Claim
from guywire.lab.studies.verdict import (
    FEWEST_SEEDS,
    Judgement,
    Verdict,
    at_least,
    exceeds,
    points,
    worst,
)

__all__ = ["CLAIMS"]

_GAIN = 0.05
_MOST_OFF = 0.10
_NEAR = 0.02
_POINT = 0.01
_SPARED = 0.7

_FULL, _PLAIN = "R-AMT", "AMT"


def _few_off(table: Table, arm: str) -> Verdict:
    off = table.mean(arm, "off")
    if off.n < FEWEST_SEEDS:
        return "inconclusive"
    return "reproduced" if off.mean < _MOST_OFF else "not reproduced"


def _gain(table: Table) -> Judgement:
    gain = table.difference(_FULL, "zero-shot", "base")
    off = table.mean(_FULL, "off")
    return Judgement(
        worst([exceeds(gain, _GAIN), _few_off(table, _FULL)]),
        f"Switching off {100 * off.mean:.1f} % of the attention's weights ends {points(gain)} from "
        "the untouched model on the base classes of the new style.",
    )


def _which(table: Table) -> Judgement:
    gain = table.difference(_FULL, f"random as {_FULL}", "base")
    return Judgement(
        exceeds(gain, _GAIN),
        f"Learnt masks end {points(gain)} from random masks of equal sparsity.",
    )


def _lora(table: Table) -> Judgement:
    gap = table.difference(_FULL, "LoRA", "base")
    return Judgement(
        at_least(gap, _NEAR), f"On the base classes learnt masks end {points(gap)} from LoRA."
    )


def _new(table: Table) -> Judgement:
    new = table.difference(_FULL, _PLAIN, "new")
    base = table.difference(_FULL, _PLAIN, "base")
    return Judgement(
        worst([exceeds(new, _POINT), at_least(base, _POINT)]),
        f"Gradient dropout changes the accuracy on new classes by {points(new)} and on base classes "
        f"by {points(base)}.",
    )


def _kept(table: Table) -> Judgement:
    losses = {arm: table.difference("zero-shot", arm, "kept").values for arm in (_FULL, _PLAIN)}
    shared = sorted(losses[_FULL].keys() & losses[_PLAIN].keys())
    spared = bootstrap({s: _SPARED * losses[_PLAIN][s] - losses[_FULL][s] for s in shared})
    before, after = (100 * sum(losses[arm].values()) / len(losses[arm]) for arm in (_PLAIN, _FULL))
    verdict: Verdict = exceeds(spared, 0.0)
    if verdict == "reproduced" and min(losses[_PLAIN].values()) <= 0.0:
        verdict = "inconclusive"  # where nothing is lost, nothing can be spared
    return Judgement(
        verdict,
        f"In the styles of pretraining plain mask tuning loses {before:.1f} points, with gradient "
        f"dropout {after:.1f}.",
    )


def _line(table: Table) -> Judgement:
    gain = table.difference("line: R-AMT", "line: zero-shot", "base")
    chance = table.difference("line: R-AMT", "random as line: R-AMT", "base")
    return Judgement(
        worst([exceeds(gain, _GAIN), exceeds(chance, _GAIN)]),
        f"On line drawings learnt masks end {points(gain)} from the untouched model and "
        f"{points(chance)} from random masks of equal sparsity.",
    )


CLAIMS = (
    Claim(
        "few weights off",
        "Switching off a small part of the attention's weights, learnt from 16 images a class, makes "
        "a frozen vision-language model much better on the task.",
        "R-AMT (l=1) over zero-shot on the base classes: 5 points or more, every seed positive, with "
        "less than 10 % of the masked tensors' weights off in the mean",
        _gain,
        ("R-AMT",),
    ),
    Claim(
        "which weights matters",
        "The masks uncover knowledge: it is the choice of weights that helps.",
        "R-AMT over random masks with as many weights off in each tensor, base classes: 5 points or "
        "more, every seed positive",
        _which,
        ("R-AMT",),
    ),
    Claim(
        "near LoRA",
        "Masks adapt as well as methods that change weights.",
        "R-AMT no more than 2 points below LoRA on the base classes",
        _lora,
        ("R-AMT", "LoRA"),
    ),
    Claim(
        "new classes",
        "Gradient dropout regularity helps on classes that were not trained on.",
        "R-AMT over AMT on new classes: 1 point or more, every seed positive, and no more than 1 "
        "point below it on the base classes",
        _new,
        ("R-AMT", "AMT"),
    ),
    Claim(
        "what was known is kept",
        "Gradient dropout regularity keeps general knowledge.",
        "what R-AMT loses in the styles of pretraining is at most 0.7 times what AMT loses, in every "
        "seed",
        _kept,
        ("R-AMT", "AMT"),
    ),
    Claim(
        "a style farther away",
        "The same holds where the new domain is far from pretraining.",
        "on line drawings R-AMT over zero-shot, and over random masks of equal sparsity: 5 points or "
        "more each, every seed positive",
        _line,
        ("R-AMT",),
    ),
)
