"""The claims, each with its rule, written before the numbers existed. Accuracies are fractions."""

from __future__ import annotations

from guywire.lab.studies.statistics import Interval, Table
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

_GAIN = 0.03
_TIE = 0.005
_ALONE = 0.25
_DISTILLED = 0.05


def _a_gain(table: Table) -> Judgement:
    gain = table.difference("captions: L2", "captions: plain", "accuracy")
    return Judgement(
        exceeds(gain, _GAIN),
        f"On ten tasks of captions L2 in self-attention ends {points(gain)} from plain fine-tuning.",
    )


def _a_simple(table: Table) -> Judgement:
    ewc = table.difference("captions: L2", "captions: EWC", "accuracy")
    features = table.difference("captions: L2", "captions: FeatKD", "accuracy")
    return Judgement(
        worst([at_least(ewc), at_least(features)]),
        f"With a pretrained text encoder L2 ends {points(ewc)} from EWC and {points(features)} from "
        "feature distillation.",
    )


def _a_frozen(table: Table) -> Judgement:
    gain = table.difference("captions: L2", "captions: frozen", "accuracy")
    return Judgement(
        exceeds(gain, 0.01),
        f"Moving queries, keys and values under L2 ends {points(gain)} from training the head alone.",
    )


def _a_forgetting(table: Table) -> Judgement:
    plain = table.values("captions: plain", "forgetting_local")
    best = min(
        ("captions: L2", "captions: EWC"), key=lambda c: table.mean(c, "forgetting_local").mean
    )
    held = table.values(best, "forgetting_local")
    # Positive where at least half of the forgetting is gone.
    spared = table.difference("captions: plain", best, "forgetting_local")
    half = [plain[s] / 2 - held[s] for s in sorted(plain.keys() & held.keys())]
    few = spared.n < FEWEST_SEEDS
    verdict: Verdict = "inconclusive"
    if not few and min(plain.values()) > 0 and all(h >= 0 for h in half):
        verdict = "reproduced"
    elif not few and sum(half) < 0 and max(half) < 0:
        verdict = "not reproduced"
    before, after = (
        table.mean(c, "forgetting_local").mean * 100 for c in ("captions: plain", best)
    )
    return Judgement(
        verdict,
        f"Local forgetting falls from {before:.1f} points (plain) to {after:.1f} "
        f"({best.removeprefix('captions: ')}).",
    )


def _b_alone(table: Table) -> Judgement:
    verdicts: list[Verdict] = []
    said: list[str] = []
    for arm in ("EWC", "L2", "FeatKD"):
        alone = table.mean(f"garments, random: {arm}", "accuracy")
        gain = table.difference(
            f"garments, random: PredKD+{arm}", f"garments, random: {arm}", "accuracy"
        )
        low = alone.high is not None and alone.high < _ALONE
        failed: Verdict = "reproduced" if low else "inconclusive"
        if alone.low is not None and alone.low >= _ALONE:
            failed = "not reproduced"
        verdicts.extend((failed, exceeds(gain, _DISTILLED)))
        said.append(f"{arm} alone ends at {100 * alone.mean:.1f} %, with PredKD {points(gain)}")
    return Judgement(worst(verdicts), "From random weights, " + "; ".join(said) + ".")


def _b_helps(table: Table) -> Judgement:
    ewc = table.difference(
        "garments, random: PredKD+EWC", "garments, random: PredKD+FeatKD", "accuracy"
    )
    l2 = table.difference(
        "garments, random: PredKD+L2", "garments, random: PredKD+FeatKD", "accuracy"
    )
    less = table.difference(
        "garments, random: PredKD", "garments, random: PredKD+EWC", "forgetting_global"
    )
    return Judgement(
        worst([at_least(ewc), at_least(l2), exceeds(less, 0.0)]),
        f"From random weights, beside PredKD, EWC ends {points(ewc)} and L2 {points(l2)} from "
        f"feature distillation, and EWC takes {points(less)} off PredKD's global forgetting.",
    )


def _b_flip(table: Table) -> Judgement:
    def gap(start: str) -> Interval:
        return table.difference(
            f"garments, {start}: PredKD+L2", f"garments, {start}: PredKD", "accuracy"
        )

    random, pretrained = gap("random"), gap("pretrained")
    shared = sorted(random.values.keys() & pretrained.values.keys())
    from guywire.lab.studies.statistics import bootstrap

    rise = bootstrap({seed: pretrained.values[seed] - random.values[seed] for seed in shared})
    return Judgement(
        exceeds(rise, _GAIN),
        f"What L2 adds to PredKD goes from {points(random)} (random weights) to "
        f"{points(pretrained)} (pretrained on digits), a rise of {points(rise)}.",
    )


def _b_pretrained(table: Table) -> Judgement:
    ewc = table.difference(
        "garments, pretrained: PredKD+L2", "garments, pretrained: PredKD+EWC", "accuracy"
    )
    features = table.difference(
        "garments, pretrained: PredKD+L2", "garments, pretrained: PredKD+FeatKD", "accuracy"
    )
    return Judgement(
        worst([at_least(ewc), at_least(features)]),
        f"From digits, beside PredKD, L2 ends {points(ewc)} from EWC and {points(features)} from "
        "feature distillation.",
    )


C_RIVALS = ("plain", "plain, all", "L2, all", "EWC", "FeatKD", "PredKD", "frozen")


def _c_best(table: Table) -> Judgement:
    gaps = {
        rival: table.difference("drawings: L2", f"drawings: {rival}", "accuracy")
        for rival in C_RIVALS
    }
    wider = gaps["L2, all"]
    verdict = worst([*(at_least(gap) for gap in gaps.values()), exceeds(wider, 0.0)])
    closest = min(gaps, key=lambda rival: gaps[rival].mean)
    return Judgement(
        verdict,
        f"L2 with only self-attention free ends {points(wider)} from L2 with all weights free and "
        f"held, and {points(gaps[closest])} from the strongest other arm without old data "
        f"({closest}).",
    )


def _c_gain(table: Table) -> Judgement:
    gain = table.difference("drawings: L2", "drawings: plain", "accuracy")
    return Judgement(
        exceeds(gain, _GAIN),
        f"On five tasks of drawings L2 in self-attention ends {points(gain)} from plain "
        "fine-tuning of the same weights.",
    )


_B = "garments, {start}: PredKD+{arm}"

CLAIMS = (
    Claim(
        "captions: L2 holds",
        "L2 parameter regularisation, applied to the self-attention blocks of a pretrained "
        "transformer, holds what was learnt without any old data.",
        "accuracy of L2 over plain fine-tuning of the same weights: 3 points or more, every seed "
        "positive",
        _a_gain,
        ("captions: L2",),
    ),
    Claim(
        "captions: L2 is enough",
        "With pretraining, plain L2 is at least as good as EWC and feature distillation.",
        "accuracy of L2 no more than 0.5 points below EWC's, nor below feature distillation's",
        _a_simple,
        ("captions: L2", "captions: EWC", "captions: FeatKD"),
    ),
    Claim(
        "captions: worth moving",
        "Letting self-attention move under L2 is worth it: it learns more than a head on frozen "
        "features.",
        "accuracy of L2 over the frozen encoder: 1 point or more, every seed positive",
        _a_frozen,
        ("captions: L2",),
    ),
    Claim(
        "captions: forgetting",
        "Parameter regularisation has the lowest forgetting.",
        "EWC or L2 has at most half the local forgetting of plain fine-tuning, in every seed",
        _a_forgetting,
        ("captions: L2", "captions: EWC"),
    ),
    Claim(
        "garments: alone is not enough",
        "Without prediction distillation, parameter regularisation and feature distillation end "
        "where only the last task is alive; prediction distillation is what makes them work.",
        "from random weights EWC, L2 and FeatKD alone end below 25 % (interval included; the last "
        "task alone is 20 %), and PredKD beside each adds 5 points or more, every seed positive",
        _b_alone,
        tuple(
            f"garments, random: {prefix}{arm}"
            for arm in ("EWC", "L2", "FeatKD")
            for prefix in ("", "PredKD+")
        ),
    ),
    Claim(
        "garments: parameters from scratch",
        "Parameter regularisation does not fail from scratch: beside prediction distillation it "
        "forgets least, and does better than feature distillation.",
        "from random weights PredKD+EWC and PredKD+L2 no more than 0.5 points below PredKD+FeatKD, "
        "and PredKD+EWC has less global forgetting than PredKD in every seed",
        _b_helps,
        tuple(_B.format(start="random", arm=arm) for arm in ("EWC", "L2", "FeatKD")),
    ),
    Claim(
        "garments: pretraining turns the order",
        "Pretraining removes the price of low plasticity: what L2 adds to prediction distillation "
        "rises.",
        "(PredKD+L2) - PredKD rises by 3 points or more from random to pretrained weights, every "
        "seed positive",
        _b_flip,
        tuple(_B.format(start=start, arm="L2") for start in ("random", "pretrained")),
    ),
    Claim(
        "garments: L2 is enough",
        "With pretraining, plain L2 is at least as good as EWC and feature distillation.",
        "from pretrained weights PredKD+L2 no more than 0.5 points below PredKD+EWC, nor below "
        "PredKD+FeatKD",
        _b_pretrained,
        tuple(_B.format(start="pretrained", arm=arm) for arm in ("EWC", "L2", "FeatKD")),
    ),
    Claim(
        "drawings: self-attention is the place",
        "L2 applied to the self-attention blocks of a vision transformer is best.",
        "accuracy of L2 in self-attention no more than 0.5 points below every other arm without old "
        "data (plain, EWC, PredKD, FeatKD, frozen, L2 in all weights), and above L2 in all weights "
        "in every seed",
        _c_best,
        (
            "drawings: L2",
            "drawings: L2, all",
            "drawings: EWC",
            "drawings: FeatKD",
            "drawings: PredKD",
        ),
    ),
    Claim(
        "drawings: L2 holds",
        "L2 in self-attention holds a vision transformer through a class-incremental stream.",
        "accuracy of L2 over plain fine-tuning of the same weights: 3 points or more, every seed "
        "positive",
        _c_gain,
        ("drawings: L2",),
    ),
)
