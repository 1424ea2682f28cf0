"""The claims, each with its rule, written before the numbers existed. Accuracies are fractions."""

from __future__ import annotations

from collections.abc import Sequence

from guywire.lab.studies.stability_gap.claims import by_seed
from guywire.lab.studies.statistics import Interval, Table
from guywire.lab.studies.study import Claim
from guywire.lab.studies.verdict import Judgement, at_least, exceeds, points, worst

__all__ = ["CLAIMS", "RATE"]

RATE = 0.99
"""The rate of the claims; DARE must break there, or there is nothing to mend."""
_AT = f"accuracy at {RATE}"
_Q = f"q at {RATE}"
_LARGE_RATES = (0.5, 0.7, 0.9)


def _rescaling(table: Table) -> Judgement:
    gain = table.difference("garments: 1/q_v", "garments: DARE", _AT)
    dare, searched = (table.mean(f"garments: {m}", _AT).mean for m in ("DARE", "1/q_v"))
    return Judgement(
        exceeds(gain, 0.10),
        f"With {RATE:.0%} of the change dropped, DARE keeps {100 * dare:.1f} % accuracy, and a q "
        f"searched with labels {100 * searched:.1f} %: {points(gain)}.",
    )


def _unlabelled(table: Table) -> Judgement:
    gap = table.difference("garments: 1/q_e", "garments: 1/q_v", _AT)
    return Judgement(
        at_least(gap, 0.03),
        f"A q searched on the change of the features alone ends {points(gap)} from one searched with "
        "labels.",
    )


def _larger(table: Table) -> Judgement:
    found = {m: table.values(f"garments: {m}", _Q) for m in ("1/q_v", "1/q_e")}
    holds = {
        seed: all(values[seed] > (1.0 - RATE) * (1.0 + 1e-6) for values in found.values())
        for seed in found["1/q_v"]
    }
    words = " and ".join(
        f"{min(values.values()):.3f} to {max(values.values()):.3f} ({method})"
        for method, values in found.items()
    )
    return Judgement(
        by_seed(holds), f"The q found is {words}, where DARE divides by {1 - RATE:.2f}."
    )


def _trained(table: Table) -> Judgement:
    gain = table.difference("garments, AdamR-L2: DARE", "garments: DARE", _AT)
    cost = table.difference("garments, AdamR-L2: unpruned", "garments: unpruned", "accuracy")
    return Judgement(
        worst([exceeds(gain, 0.10), at_least(cost, 0.01)]),
        f"After fine-tuning with AdamR-L2 plain DARE ends {points(gain)} from DARE after Adam; "
        f"unpruned the model ends {points(cost)} from Adam's.",
    )


def _large(table: Table) -> Judgement:
    best: tuple[Interval, float, str] | None = None
    for rate in _LARGE_RATES:
        for method in ("MP", "WANDA"):
            gain = table.difference(
                f"garments, large: {method}", "garments, large: DARE", f"accuracy at {rate}"
            )
            if best is None or gain.mean > best[0].mean:
                best = gain, rate, method
    assert best is not None
    gain, rate, method = best
    return Judgement(
        exceeds(gain, 0.05),
        f"Where the change is large, {method} ends {points(gain)} from DARE at a rate of {rate}.",
    )


def _variance(table: Table) -> Judgement:
    ratios = table.values("garments: DARE", "variance ratio")
    return Judgement(
        by_seed({seed: abs(ratio - 1.0) <= 0.05 for seed, ratio in ratios.items()}),
        f"At a layer the measured variance of DARE's error is {_range(list(ratios.values()))} times "
        "p / (1 - p) * sum Q.",
    )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


CLAIMS = (
    Claim(
        "rescaling",
        "At extreme rates a better rescaling factor than 1 / (1 - p) brings the task back.",
        f"test accuracy at a rate of {RATE}, garments: 1/q_v at least 10 points above DARE on average, "
        "and above it in every seed",
        _rescaling,
        ("plain",),
    ),
    Claim(
        "unlabelled",
        "The change of the model's output is a good proxy: q can be chosen without labels.",
        f"test accuracy at a rate of {RATE}, garments: 1/q_e no more than 3 points below 1/q_v",
        _unlabelled,
        ("plain",),
    ),
    Claim(
        "larger",
        "The best q is larger than 1 - p.",
        f"both searches find q > 1 - p at a rate of {RATE} in every seed, garments",
        _larger,
        ("plain",),
    ),
    Claim(
        "trained",
        "Decay towards the pretrained weights in training (AdamR-L2) makes DARE work at extreme rates "
        "without loss of accuracy.",
        f"test accuracy at a rate of {RATE}, garments: AdamR-L2 then DARE at least 10 points above DARE "
        "after Adam, in every seed; unpruned no more than 1 point below Adam",
        _trained,
        ("plain", "AdamR-L2"),
    ),
    Claim(
        "large",
        "Where the change is large, pruning by importance beats random pruning.",
        "fine-tuned at ten times the learning rate, garments: the better of MP and WANDA at least 5 "
        "points above DARE at some rate of 0.5, 0.7 or 0.9, in every seed",
        _large,
        ("plain",),
    ),
    Claim(
        "variance",
        "The output error of DARE has mean 0 and variance p / (1 - p) * sum c^2.",
        f"second layer, a rate of {RATE}: measured over masks within 5 % of the formula in every seed",
        _variance,
    ),
)
