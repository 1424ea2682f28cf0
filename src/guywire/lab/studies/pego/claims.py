"""The claims, each with its rule, written before the numbers existed. Accuracies are fractions."""

from __future__ import annotations

from guywire.lab.studies.pego.data import STYLES
from guywire.lab.studies.statistics import Interval, Table, bootstrap
from guywire.lab.studies.study import Claim
from guywire.lab.studies.verdict import FEWEST_SEEDS, Judgement, Verdict, exceeds, points

__all__ = ["CLAIMS"]

_GAIN = 0.01
_KEPT = 0.02
_TIMES = 10.0
_WITHIN = 0.01
_MOST_BELOW = 1 / 3


def _full(table: Table) -> Judgement:
    gain = table.difference("PEGO", "full", "unseen")
    return Judgement(
        exceeds(gain, _GAIN),
        f"On the style left out PEGO is {points(gain)} from full fine-tuning.",
    )


def _lora(table: Table) -> Judgement:
    gain = table.difference("PEGO", "LoRA", "unseen")
    pairs = [
        (table.values("PEGO", f"unseen, {style}"), table.values("LoRA", f"unseen, {style}"))
        for style in STYLES
    ]
    single = [a[seed] - b[seed] for a, b in pairs for seed in a.keys() & b.keys()]
    below = sum(value < 0 for value in single)
    verdict: Verdict = "inconclusive"
    if gain.n >= FEWEST_SEEDS and gain.high is not None:
        if gain.high < 0:
            verdict = "not reproduced"
        elif gain.mean > 0 and below <= _MOST_BELOW * len(single):
            verdict = "reproduced"
    return Judgement(
        verdict,
        f"On the style left out PEGO is {points(gain)} from one LoRA of equal size, and below it in "
        f"{below} of {len(single)} runs.",
    )


def _overlap(table: Table) -> Judgement:
    times = {name: _ratio(table, name) for name in ("preserve", "diversify")}
    cost = table.difference("PEGO", "group", "source validation")
    enough = all(min(ratio.values.values()) >= _TIMES for ratio in times.values())
    too_few = any(max(ratio.values.values()) < _TIMES for ratio in times.values())
    verdict: Verdict = "inconclusive"
    if cost.n >= FEWEST_SEEDS and cost.high is not None:
        if too_few or cost.high < -_WITHIN:
            verdict = "not reproduced"
        elif enough and cost.mean >= -_WITHIN:
            verdict = "reproduced"
    said = " and ".join(f"{ratio.mean:.1f} times ({name})" for name, ratio in times.items())
    return Judgement(
        verdict,
        f"The penalty lowers the overlaps {said} against the same group without it, and accuracy on "
        f"source validation changes by {points(cost)}.",
    )


def _ratio(table: Table, metric: str) -> Interval:
    """Return how many times larger the group's overlap is, seed by seed."""
    free, held = table.values("group", metric), table.values("PEGO", metric)
    return bootstrap(
        {seed: free[seed] / max(held[seed], 1e-12) for seed in free.keys() & held.keys()}
    )


def _old(table: Table) -> Judgement:
    kept = table.difference("PEGO", "full", "old")
    return Judgement(
        exceeds(kept, _KEPT),
        f"A linear classifier of the pretraining's subgroups on PEGO's features is {points(kept)} from "
        "one on the features of full fine-tuning.",
    )


_RATES = tuple(f"{arm}, rate, without {style}" for arm in ("full", "LoRA") for style in STYLES)
_STRENGTHS = tuple(f"PEGO, strength, without {style}" for style in STYLES)

CLAIMS = (
    Claim(
        "unseen",
        "Best on unseen domains, with few trainable parameters (plain fine-tuning of the same CLIP is "
        "far below).",
        "PEGO's mean accuracy over the four styles left out at least 1 point above full fine-tuning, "
        "with the sign in every seed",
        _full,
        (*_RATES, *_STRENGTHS),
    ),
    Claim(
        "modules",
        "A group with both terms is better than one LoRA of equal size.",
        "PEGO's mean accuracy over the styles left out above that of LoRA, and below it in no more "
        "than a third of the runs (a style and a seed each); not reproduced if the whole interval of "
        "the difference lies below 0",
        _lora,
        (*_RATES[len(STYLES) :], *_STRENGTHS),
    ),
    Claim(
        "orthogonal",
        "The learned updates are orthogonal to the pretrained weights and to each other.",
        "both sums of absolute products at least 10 times lower than in the same group without "
        "penalty in every seed, at an accuracy on source validation at most 1 point lower; not "
        "reproduced if one of them is below 10 times in every seed, or the whole interval of the "
        "accuracies' difference below -1 point",
        _overlap,
        _STRENGTHS,
    ),
    Claim(
        "preserved",
        "Preserving orthogonality keeps what pretraining knew.",
        "a linear classifier for the pretraining's subgroups at least 2 points better on PEGO's "
        "features than on those of full fine-tuning, with the sign in every seed",
        _old,
        (*_RATES, *_STRENGTHS),
    ),
)
