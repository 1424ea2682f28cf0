"""The claims, each with its rule, written before the numbers existed."""

from __future__ import annotations

import guywire as gw
from guywire.lab.studies.sara.arms import ARMS
from guywire.lab.studies.statistics import Interval, Table, bootstrap
from guywire.lab.studies.study import Claim
from guywire.lab.studies.verdict import FEWEST_SEEDS, Judgement, Verdict, exceeds, worst

__all__ = ["CLAIMS", "harmony"]

_HARMLESS = 0.01
_TIMES = 3.0
_FALL = 0.20
_RATIO = 0.8
_HALF = 0.5
_PLACES = 2


def harmony(table: Table) -> dict[str, Interval]:
    """Return the paper's harmony index of every arm.

    The new style's error stands where the paper has FID, and the old style's rise, negative, where
    it has CLIP's score. The index is taken within each seed, over the arms.

    Args:
        table: with ``target_error`` and ``source_rise``.

    Returns:
        Arm to interval over the seeds.
    """
    target = {arm: table.values(arm, "target_error") for arm in ARMS}
    rise = {arm: table.values(arm, "source_rise") for arm in ARMS}
    seeds = sorted(set.intersection(*(set(values) for values in target.values())))
    by_seed = {
        seed: gw.vlhi([target[a][seed] for a in ARMS], [-rise[a][seed] for a in ARMS])
        for seed in seeds
    }
    return {arm: bootstrap({s: by_seed[s][i] for s in seeds}) for i, arm in enumerate(ARMS)}


def percent(effect: Interval) -> str:
    """Return a share in per cent, with its interval.

    Args:
        effect: a share.

    Returns:
        For instance ``3.1 [2.0, 4.0] %``.
    """
    if effect.low is None or effect.high is None:
        return f"{100 * effect.mean:.2f} %"
    return f"{100 * effect.mean:.2f} [{100 * effect.low:.2f}, {100 * effect.high:.2f}] %"


def _ineffective(table: Table) -> Judgement:
    small, random = (
        table.values("frozen", f"rise_without_{kind}") for kind in ("smallest", "random")
    )
    harmless = bootstrap({s: _HARMLESS - v for s, v in small.items()})
    times = bootstrap({s: random[s] - _TIMES * max(small[s], 0.0) for s in small})
    return Judgement(
        worst([exceeds(harmless, 0.0), exceeds(times, 0.0)]),
        "Without its smallest 1 % of weights the old style's error rises by "
        f"{percent(bootstrap(small))}, without a random 1 % by {percent(bootstrap(random))}.",
    )


def _learns(table: Table) -> Judgement:
    fall = table.mean("SaRA", "target_fall")
    return Judgement(
        exceeds(fall, _FALL),
        f"The new style's error falls by {percent(fall)} from that of the pretrained model; whole "
        f"fine-tuning's by {percent(table.mean('full', 'target_fall'))}.",
    )


def _keeps(table: Table) -> Judgement:
    mine, largest = (table.values(arm, "source_rise") for arm in ("SaRA", "largest"))
    margin = bootstrap({s: _RATIO * largest[s] - mine[s] for s in mine})
    table.difference("largest", "SaRA", "source_rise")
    rises = {a: percent(table.mean(a, "source_rise")) for a in ARMS}
    falls = {a: percent(table.mean(a, "target_fall")) for a in ("SaRA", "largest")}
    return Judgement(
        exceeds(margin, 0.0),
        f"The old style's error rises by {rises['SaRA']} with SaRA, {rises['no adjustment']} without "
        f"the second choice, {rises['random']} with random weights and {rises['largest']} with the "
        f"largest, while the new style's falls by {falls['SaRA']} with SaRA and {falls['largest']} "
        "with the largest.",
    )


def _rank(table: Table) -> Judgement:
    rise = table.difference("no rank loss", "SaRA", "source_rise")
    norm = table.difference("no rank loss", "SaRA", "nuclear_norm")
    return Judgement(
        worst([exceeds(rise, 0.0), exceeds(norm, 0.0)]),
        f"The nuclear norm's term changes the old style's rise by {percent(rise)} (positive: less "
        f"with it) and the nuclear norm by {norm.words()}, of "
        f"{table.mean('no rank loss', 'nuclear_norm').words()}.",
    )


def _adjusts(table: Table) -> Judgement:
    with_it, without = (table.values(arm, "still_small") for arm in ("SaRA", "no adjustment"))
    margin = bootstrap({s: _HALF * without[s] - with_it[s] for s in with_it})
    table.difference("no adjustment", "SaRA", "still_small")
    return Judgement(
        exceeds(margin, 0.0),
        f"At the end {percent(bootstrap(with_it))} of the chosen weights are still below the "
        f"threshold with the second choice, {percent(bootstrap(without))} without.",
    )


def _harmonious(table: Table) -> Judgement:
    index = harmony(table)
    seeds = sorted(index["SaRA"].values)

    def place(scores: dict[str, float]) -> int:
        return 1 + sum(score > scores["SaRA"] for arm, score in scores.items() if arm != "SaRA")

    mean = place({arm: i.mean for arm, i in index.items()})
    each = [place({arm: i.values[s] for arm, i in index.items()}) for s in seeds]
    verdict: Verdict = "inconclusive"
    if len(seeds) >= FEWEST_SEEDS:
        if mean <= _PLACES:
            verdict = "reproduced"
        elif all(p > _PLACES for p in each):
            verdict = "not reproduced"
    words = ", ".join(f"{arm} {i.mean:.2f}" for arm, i in index.items())
    return Judgement(verdict, f"Harmony index, mean over seeds: {words}; SaRA is number {mean}.")


_TUNED = ("masked rate", "rank strength")

CLAIMS = (
    Claim(
        name="ineffective weights",
        says="The weights of smallest absolute value have hardly any effect: without those below a "
        "threshold the model works as before.",
        rule="In every seed, and in the mean: without the smallest 1 % of all weights the old style's "
        "error rises by less than 1 %, and without a random 1 % by more than 3 times as much.",
        judge=_ineffective,
    ),
    Claim(
        name="learns the task",
        says="Fine-tuning only these weights learns the new task.",
        rule="The new style's error falls by at least 20 % from the pretrained model's.",
        judge=_learns,
        rests_on=_TUNED,
    ),
    Claim(
        name="keeps the prior",
        says="Training the smallest weights keeps what the model knew better than training others.",
        rule="With as many weights, SaRA's rise of the old style's error is at most 0.8 times that of "
        "training the largest, in the mean, and less than 0.8 times in every seed.",
        judge=_keeps,
        rests_on=_TUNED,
    ),
    Claim(
        name="rank loss",
        says="The nuclear norm of the trained weights keeps their matrices of low rank, and with it "
        "the prior.",
        rule="With it, in every seed, the old style's error rises less and the nuclear norm of the "
        "masked matrices is smaller than without.",
        judge=_rank,
        rests_on=_TUNED,
    ),
    Claim(
        name="second choice",
        says="Choosing again half-way makes use of weights that are still ineffective.",
        rule="At the end at most half as many of the chosen weights are still below the threshold as "
        "without the second choice.",
        judge=_adjusts,
        rests_on=_TUNED,
    ),
    Claim(
        name="harmony",
        says="SaRA balances learning the task and keeping the prior best.",
        rule="By the paper's harmony index over the arms, with the new style's error for FID and the "
        "old style's rise for CLIP's score, SaRA is first or second in the mean over seeds. Not "
        "reproduced if it is neither in the mean nor in any seed.",
        judge=_harmonious,
        rests_on=(*_TUNED, "LoRA rate", "full rate"),
    ),
)
