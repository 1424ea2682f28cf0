"""The claims and their rules, written before the numbers."""

from __future__ import annotations

from guywire.lab.studies.statistics import Interval, Table, bootstrap
from guywire.lab.studies.study import Claim
from guywire.lab.studies.verdict import FEWEST_SEEDS, Judgement, Verdict, exceeds

__all__ = ["CLAIMS", "within"]

POINT = 0.01


def within(difference: Interval, margin: float) -> Verdict:
    """Judge whether two things agree.

    Args:
        difference: of them.
        margin: how far apart they may be.

    Returns:
        *Reproduced* if the whole interval lies within the margin of zero, *not reproduced* if none of
        it does.

    Example:
        >>> within(bootstrap({0: 0.001, 1: -0.002, 2: 0.0}), 0.005)
        'reproduced'
    """
    if difference.n < FEWEST_SEEDS or difference.low is None or difference.high is None:
        return "inconclusive"
    if -margin <= difference.low and difference.high <= margin:
        return "reproduced"
    if difference.low > margin or difference.high < -margin:
        return "not reproduced"
    return "inconclusive"


def _connected(table: Table) -> Judgement:
    gains, barriers = table.mean("line", "line_gain"), table.mean("line", "line_barrier")
    fits = [
        gains.values[seed] >= 3 * POINT and barriers.values[seed] <= 0.05 for seed in gains.values
    ]
    verdict: Verdict = "inconclusive"
    if len(fits) >= FEWEST_SEEDS and (all(fits) or not any(fits)):
        verdict = "reproduced" if all(fits) else "not reproduced"
    return Judgement(
        verdict,
        f"Between the ends of the first two tasks the best point is {gains.words()} above both ends "
        f"in mean accuracy, and the loss rises {barriers.words()} of its lower end above the line; "
        f"{sum(fits)} of {len(fits)} seeds have both.",
    )


def _over_replay(table: Table) -> Judgement:
    gain = table.difference("I-LoRA", "ER", "accuracy")
    average = table.difference("I-LoRA", "ER, slow", "accuracy")
    return Judgement(
        exceeds(gain, POINT),
        f"The slow adapter ends {gain.words()} above replay, and {average.words()} above an average "
        "of plain replay over the same steps.",
    )


def _over_sequential(table: Table) -> Judgement:
    gain = table.difference("I-LoRA", "sequential", "accuracy")
    return Judgement(
        exceeds(gain, 8 * POINT), f"The slow adapter ends {gain.words()} above no protection."
    )


def _forgets_less(table: Table) -> Judgement:
    ours, theirs = table.values("I-LoRA", "forgetting"), table.values("ER", "forgetting")
    table.difference("I-LoRA", "ER", "forgetting")
    room = bootstrap({seed: 0.8 * theirs[seed] - ours[seed] for seed in ours})
    return Judgement(
        exceeds(room, 0.0),
        f"The slow adapter forgets {table.mean('I-LoRA', 'forgetting').words()}, replay "
        f"{table.mean('ER', 'forgetting').words()}.",
    )


def _slow_over_fast(table: Table) -> Judgement:
    gain = table.difference("I-LoRA", "I-LoRA, fast", "accuracy")
    return Judgement(
        exceeds(gain, 0.0), f"At the end the slow adapter is {gain.words()} above the fast one."
    )


def _short(table: Table) -> Judgement:
    gap = table.difference("I-LoRA, decay 0.25", "I-LoRA, decay 0.25, fast", "accuracy")
    replay = table.difference("I-LoRA, decay 0.25", "ER", "accuracy")
    return Judgement(
        within(gap, 0.5 * POINT),
        f"With a memory of one step and a third the slow adapter is {gap.words()} from the fast one "
        f"beside it, and {replay.words()} from plain replay.",
    )


CLAIMS = (
    Claim(
        "connected",
        "The minima of successive tasks are connected by a line of low loss in LoRA space, and a "
        "point inside it balances old and new better than both ends.",
        "in every seed: 3 points of mean accuracy above both ends, barrier at most 5% of the lower "
        "end's loss",
        _connected,
        ("sequential",),
    ),
    Claim(
        "over replay",
        "I-LoRA is better than experience replay (by up to 11% over the previous best).",
        "slow adapter above replay by 1 point, in every seed",
        _over_replay,
        ("ER", "I-LoRA", "I-LoRA: horizon"),
    ),
    Claim(
        "over sequential",
        "I-LoRA is better than tuning on one task after another.",
        "slow adapter above sequential tuning by 8 points, in every seed",
        _over_sequential,
        ("sequential", "ER", "I-LoRA", "I-LoRA: horizon"),
    ),
    Claim(
        "forgets less",
        "The slow adapter keeps old tasks.",
        "its forgetting is at most 0.8 of replay's, in every seed",
        _forgets_less,
        ("ER", "I-LoRA", "I-LoRA: horizon"),
    ),
    Claim(
        "slow over fast",
        "The long-term memory is the one to use.",
        "slow adapter at least as good as the fast one, in every seed",
        _slow_over_fast,
        ("ER", "I-LoRA", "I-LoRA: horizon"),
    ),
    Claim(
        "horizon",
        "The printed decay of 0.25 a step is no long-term memory: the horizon does the work, not the "
        "name. (Our reading; the paper says nothing of the horizon.)",
        "the slow adapter ends within 0.5 points of the fast one beside it, which is replay plus the "
        "hidden states' term",
        _short,
        ("ER", "I-LoRA"),
    ),
)
