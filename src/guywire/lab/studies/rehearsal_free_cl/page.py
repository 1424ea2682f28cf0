"""What the study shows: checks, plots and notes. No number depends on them."""

from __future__ import annotations

from guywire.lab.studies.statistics import Table
from guywire.lab.studies.study import Check, Plot

__all__ = ["CHECKS", "NOTES", "PLOTS"]


def _valid_accuracies(table: Table) -> bool:
    found = [row["value"] for row in table.rows if row["metric"] == "accuracy"]
    return bool(found) and all(0.0 <= value <= 1.0 for value in found)


def _frozen_stays(table: Table) -> bool:
    frozen = ("captions: frozen", "drawings: frozen")
    still = all(value == 0.0 for arm in frozen for value in table.values(arm, "moved").values())
    # With masked cross entropy and features that stay, an old task's own logits cannot change.
    kept = all(
        abs(value) < 1e-9
        for arm in frozen
        for value in table.values(arm, "forgetting_local").values()
    )
    return still and kept


def _held_moves_less(table: Table) -> bool:
    pairs = (
        ("captions: L2", "captions: plain"),
        ("drawings: L2", "drawings: plain"),
        ("drawings: L2, all", "drawings: plain, all"),
    )
    return all(
        table.mean(held, "moved").mean <= 1.01 * table.mean(free, "moved").mean
        for held, free in pairs
    )


_CAPTIONS = tuple(
    f"captions: {arm}" for arm in ("plain", "frozen", "EWC", "L2", "FeatKD", "Replay", "joint")
)
_GARMENTS = tuple(
    f"garments, {start}: {arm}"
    for start in ("random", "pretrained")
    for arm in (
        *("plain", "EWC", "L2", "FeatKD", "PredKD"),
        *("PredKD+EWC", "PredKD+L2", "PredKD+FeatKD", "Replay", "joint"),
    )
)
_DRAWINGS = tuple(
    f"drawings: {arm}"
    for arm in (
        *("plain, all", "L2, all", "plain", "frozen", "EWC", "L2"),
        *("FeatKD", "PredKD", "Replay", "joint"),
    )
)

CHECKS = (
    Check("accuracies are fractions", _valid_accuracies),
    Check("a frozen backbone does not move and forgets nothing of a task's own", _frozen_stays),
    Check("what L2 holds moves no farther than what nothing holds", _held_moves_less),
)

PLOTS = (
    Plot(
        "Captions, pretrained text encoder",
        "bars",
        "accuracy",
        "final accuracy over 80 classes",
        conditions=_CAPTIONS,
        caption="Plain fine-tuning of self-attention loses to not moving it at all; held, it "
        "should not.",
    ),
    Plot(
        "Garments, random and pretrained weights",
        "bars",
        "accuracy",
        "final accuracy over 10 classes",
        conditions=_GARMENTS,
        caption="The last task alone is 20 %. Compare what each term adds to PredKD in the two "
        "halves.",
    ),
    Plot(
        "Drawings, pretrained vision transformer",
        "bars",
        "accuracy",
        "final accuracy over 20 classes",
        conditions=_DRAWINGS,
        caption="L2 in self-attention against everything else that keeps no old data.",
    ),
    Plot(
        "Accuracy over all classes so far: captions",
        "curves",
        "accuracy_so_far",
        "accuracy over classes so far",
        against="tasks learnt",
        conditions=_CAPTIONS[:-1],
    ),
    Plot(
        "Accuracy over all classes so far: drawings",
        "curves",
        "accuracy_so_far",
        "accuracy over classes so far",
        against="tasks learnt",
        conditions=_DRAWINGS[:-1],
    ),
    Plot(
        "Accuracy against forgetting",
        "plane",
        "accuracy",
        "final accuracy",
        against="forgetting_global",
        conditions=_GARMENTS[:8] + _GARMENTS[10:18],
        caption="Parameter regularisation forgets least; what it costs in accuracy is the price "
        "of low plasticity.",
    ),
)

NOTES = (
    "The test data are the same for all seeds; a seed is an order of classes, new head weights "
    "and a new shuffle. Strengths are chosen on training data only, in another order of classes.",
    "Captions and drawings use masked cross entropy (softmax over the new classes), replay and "
    "joint training the full one.",
    "EWC sums the tasks' quadratics exactly, with true labels and a softmax likelihood, also "
    "where the head is of sigmoids. From random weights L2 holds from the second task on; from "
    "pretrained ones it holds the first task too, as in the paper.",
    "Beside another term, prediction distillation has the weight 1.",
    "Where pretraining does not raise what L2 adds on garments, this is our reason: turned digits are "
    "a pretraining task of ten shapes, so the features that L2 would keep are few; the paper pretrains "
    "on ImageNet.",
    "Where L2 in self-attention is not best on drawings, this is our reason: the vision transformer is "
    "a hundred times smaller than the paper's and was trained on some thousand drawings, so its other "
    "weights have as much left to learn as its attention, and letting them move under L2 costs little.",
    "With three orders of classes an order moves accuracy by several points, so claims of half a point "
    "can stay open.",
)
