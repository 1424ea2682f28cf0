"""The claims, each with its rule, written before the numbers existed. Accuracies are fractions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from guywire.lab.studies.statistics import Interval, Table, bootstrap
from guywire.lab.studies.study import Claim
from guywire.lab.studies.verdict import FEWEST_SEEDS, Judgement, Verdict

__all__ = ["CLAIMS", "by_seed"]

_GAP = 0.10
_RATIO = 2.0
_DROP = 0.10
_REGAINED = 0.5
_SHARE = 1.0 / 3.0
_SLACK = 0.01
_TIMES = 3.0
_GAP_OF_ALL = 0.03
_TURNED = "turned by "


def by_seed(holds: Mapping[int, bool]) -> Verdict:
    """Judge a rule that must hold in every seed.

    Args:
        holds: seed to whether it does.

    Returns:
        *reproduced* if it holds in all, *not reproduced* if in none; else, and with fewer than three
        seeds, *inconclusive*.

    Example:
        >>> by_seed({0: True, 1: True, 2: True}), by_seed({0: True, 1: True, 2: False})
        ('reproduced', 'inconclusive')
    """
    if len(holds) < FEWEST_SEEDS:
        return "inconclusive"
    if all(holds.values()):
        return "reproduced"
    return "inconclusive" if any(holds.values()) else "not reproduced"


def _percent(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{100 * interval.mean:.1f}"
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _gap(table: Table) -> Judgement:
    arm = "digits: ER"
    gap, wf, forgetting = (table.values(arm, m) for m in ("gap", "wf10", "forgetting"))
    holds = {s: gap[s] >= _GAP and wf[s] >= _RATIO * forgetting[s] for s in gap}
    return Judgement(
        by_seed(holds),
        f"With replay the worst case lies {_percent(table.mean(arm, 'gap'))} points below the average "
        f"accuracy at the end; windowed forgetting is {_percent(table.mean(arm, 'wf10'))} points, "
        f"forgetting at task ends {_percent(table.mean(arm, 'forgetting'))}.",
    )


def _fall(table: Table, arm: str) -> Judgement:
    drop, back = table.values(arm, "drop"), table.values(arm, "regained")
    holds = {s: drop[s] >= _DROP and back[s] >= _REGAINED for s in drop}
    low, half = (table.mean(arm, m).mean for m in ("lowest_after", "half_after"))
    return Judgement(
        by_seed(holds),
        f"With replay the first task falls by {_percent(table.mean(arm, 'drop'))} points after a "
        f"switch, lowest after {low:.0f} updates, and regains {_percent(table.mean(arm, 'regained'))} % "
        f"of that by the new task's end (half of it after {half:.0f} updates). A task's largest fall "
        f"within ten updates, averaged over all tasks, is {_percent(table.mean(arm, 'wf10'))} points.",
    )


def _gradients(table: Table, arm: str) -> Judgement:
    share = table.values(arm, "stability_share")
    start, peak = (table.mean(arm, f"stability_{m}").mean for m in ("start", "peak"))
    return Judgement(
        by_seed({s: value < _SHARE for s, value in share.items()}),
        f"The gradient of replay's memory term has the norm {start:.2f} in the first three steps "
        f"after a switch and at most {peak:.2f} in the next fifty; the ratio is "
        f"{table.mean(arm, 'stability_share').words(2)}.",
    )


def _turned(table: Table) -> Judgement:
    arms = [c for c in table.conditions() if c.startswith(_TURNED)]
    arms.sort(key=_angle)
    seeds = sorted(set.intersection(*(set(table.values(a, "min_acc")) for a in arms)))
    low = {s: [table.values(a, "min_acc")[s] for a in arms] for s in seeds}
    end = {s: [table.values(a, "average_accuracy")[s] for a in arms] for s in seeds}
    lost_low = bootstrap({s: low[s][0] - low[s][-1] for s in seeds})
    lost_end = bootstrap({s: end[s][0] - end[s][-1] for s in seeds})
    means = [table.mean(a, "min_acc").mean for a in arms]
    whole = _grows(means, lost_low.mean, lost_end.mean)
    each = [_grows(low[s], lost_low.values[s], lost_end.values[s]) for s in seeds]
    verdict: Verdict = "inconclusive"
    if len(seeds) >= FEWEST_SEEDS and (whole or not any(each)):
        verdict = "reproduced" if whole else "not reproduced"
    gaps = ", ".join(f"{100 * table.mean(a, 'gap').mean:.1f}" for a in arms)
    return Judgement(
        verdict,
        f"From {_angle(arms[0]):g} to {_angle(arms[-1]):g} degrees min-ACC is "
        f"{', '.join(f'{100 * m:.1f}' for m in means)} % and loses {_percent(lost_low)} points, the "
        f"average accuracy at the end {_percent(lost_end)}; the gap is {gaps} points.",
    )


def _grows(lows: list[float], lost_low: float, lost_end: float) -> bool:
    falling = all(b <= a + _SLACK for a, b in itertools.pairwise(lows))
    return falling and lost_low > 0 and lost_low >= _TIMES * lost_end


def _angle(condition: str) -> float:
    return float(condition.removeprefix(_TURNED).split()[0])


def _all_kept(table: Table) -> Judgement:
    arm = "digits: ER, all kept"
    gap = table.values(arm, "gap")
    return Judgement(
        by_seed({s: value >= _GAP_OF_ALL for s, value in gap.items()}),
        f"With every past sample in memory the worst case still lies {_percent(table.mean(arm, 'gap'))} "
        f"points below the average accuracy at the end, with a memory of the usual size "
        f"{_percent(table.mean('digits: ER', 'gap'))}.",
    )


_FALL_SAYS = (
    "At a task switch replay loses old tasks within a few dozen steps and then recovers: the "
    "stability gap."
)
_FALL_RULE = (
    "In every seed, mean over switches: in the first 30 steps after a switch the accuracy on task 1 "
    "falls at least 10 points below its value before, and at least half of the drop is regained by "
    "the end of the new task."
)
_GRADIENT_SAYS = (
    "The first updates after a switch are pure plasticity: the stability term's gradient is near zero "
    "and grows only once the damage is done."
)
_GRADIENT_RULE = (
    "In every seed, mean over switches: the norm of the memory loss's gradient, averaged over the "
    "first 3 steps after the switch, is below a third of its maximum in the following 50 steps."
)

CLAIMS = (
    Claim(
        name="gap",
        says="Replay looks steady at task ends, but its worst case lies far below, and windowed "
        "forgetting shows what forgetting at task ends does not.",
        rule="Digits, replay, in every seed: average accuracy at the end less WC-ACC is at least 10 "
        "points, and WF^10 is at least twice the forgetting.",
        judge=_gap,
    ),
    Claim(
        name="drop and recovery, digits",
        says=_FALL_SAYS,
        rule=_FALL_RULE,
        judge=lambda table: _fall(table, "digits: ER"),
    ),
    Claim(
        name="drop and recovery, garments",
        says=_FALL_SAYS,
        rule=_FALL_RULE,
        judge=lambda table: _fall(table, "garments: ER"),
    ),
    Claim(
        name="gradients, digits",
        says=_GRADIENT_SAYS,
        rule=_GRADIENT_RULE,
        judge=lambda table: _gradients(table, "digits: ER"),
    ),
    Claim(
        name="gradients, garments",
        says=_GRADIENT_SAYS,
        rule=_GRADIENT_RULE,
        judge=lambda table: _gradients(table, "garments: ER"),
    ),
    Claim(
        name="dissimilar tasks",
        says="The less alike the tasks, the deeper the gap, while the accuracy at task ends hardly "
        "shows it.",
        rule="Turned digits, replay, means over seeds: min-ACC falls from each angle to the next "
        "(within 1 point), and from the smallest to the largest it loses at least 3 times as much as "
        "the average accuracy at the end. Not reproduced if it holds neither of the means nor in any "
        "seed.",
        judge=_turned,
    ),
    Claim(
        name="everything kept",
        says="The gap is smaller but still there if the memory holds all past data.",
        rule="Digits, replay of everything, in every seed: average accuracy at the end less WC-ACC is "
        "at least 3 points.",
        judge=_all_kept,
    ),
)
