"""What the study shows: checks, plots and notes. No number depends on them."""

from __future__ import annotations

from guywire.lab.studies.sara.arms import ARMS
from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Check, Plot

__all__ = ["CHECKS", "NOTES", "PLOTS"]

_MASKED = ("SaRA", "no rank loss", "no adjustment", "largest", "random")


def _rest_stays(table: Table) -> bool:
    return all(v == 0.0 for arm in _MASKED for v in table.values(arm, "moved_outside").values())


def _same_count(table: Table) -> bool:
    mine = table.mean("SaRA", "trained").mean
    others = [table.mean(arm, "trained").mean / mine for arm in (*_MASKED, "LoRA")]
    return all(abs(ratio - 1.0) < 0.15 for ratio in others)


def _learnt(table: Table) -> bool:
    first, last = (table.mean("pretraining", f"{m}_loss").mean for m in ("first", "last"))
    return last < first


CHECKS = (
    Check("no weight outside the mask moves", _rest_stays),
    Check("LoRA and all masks train about as many numbers", _same_count),
    Check("pretraining lowers its loss", _learnt),
)

PLOTS = (
    Plot(
        "New style and old style",
        "plane",
        "source_rise",
        "old style: rise of the error",
        against="target_fall",
        across="new style: fall of the error",
        conditions=ARMS,
        caption="Right and low is good: much learnt, little lost.",
    ),
    Plot(
        "What the old style loses",
        "bars",
        "source_rise",
        "rise of the error on line drawings",
        conditions=ARMS,
        caption="Compare the smallest weights with the largest and with random ones.",
    ),
    Plot(
        "What is still small",
        "bars",
        "still_small",
        "share of the chosen weights below the threshold at the end",
        conditions=_MASKED,
        caption="The largest weights are far above it; the second choice is what sets SaRA apart "
        "from 'no adjustment'.",
    ),
)

NOTES = (
    "One network is pretrained, for all seeds and arms; a seed is the order of drawings, the noise, "
    "the random mask and LoRA's first factors. So the intervals say nothing about other networks.",
    "The authors warn of models below 100M weights, in which few weights are ineffective. This one "
    "has 0.7M.",
    "The threshold is the one below which 5 % of all weights lie. Learning rates are chosen on "
    "validation emoji, by a seed of its own, for the new style's error; the strength of the nuclear norm "
    "for the sum of both errors, each relative to the pretrained model's. All masked arms share one rate "
    "and one strength, chosen for the smallest weights.",
    "A first setting, coloured styles before and lines after, was given up on validation numbers alone: "
    "the pretrained model knew lines already, and no arm and rate lowered their error by more than "
    "7 %. It chose rates by the sum of both errors, which then prefers not to learn. The rules stayed as "
    "they were.",
    "Largest and random weights have the nuclear norm's term, too, but no second choice, since few of "
    "them are below the threshold.",
    "Drawings that equal one of the training's, as the flags do where only lines are left, are not "
    "measured on.",
    "LoRA is in attention and in the time embeddings' projections, of the rank that comes nearest to as "
    "many numbers.",
    "At the rates that learn most every arm loses about as much of the old style, LoRA and whole "
    "fine-tuning included. So the loss probably comes from the new drawings rather than from which "
    "weights learn them. In the runs that chose the rate, a lower one kept more and learnt less.",
    "The nuclear norm's term halves that norm and hardly touches the errors. It reaches matrices only, "
    "13 % of the weights here; the convolutions, nearly all others, are outside it, as released.",
    "There is no FID: with a few hundred drawings at 16 x 16 pixels it would say little, and the usual "
    "feature network is not at hand. The error of the predicted noise stands for both scores.",
)
