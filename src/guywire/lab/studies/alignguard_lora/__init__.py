"""AlignGuard-LoRA, in miniature: a model taught to refuse, fine-tuned on text that never asks it to.

A small language model learns halves of verses of the King James Bible, and to refuse where the first
half speaks of violence or death. Then it is fine-tuned with LoRA on letters of the New Testament from
which such verses are left out, held in different ways, and asked what it still refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guywire.lab import streams
from guywire.lab.studies.alignguard_lora.arms import ARMS
from guywire.lab.studies.alignguard_lora.claims import BASE, CLAIMS, HELD
from guywire.lab.studies.alignguard_lora.finetune import choose, learn
from guywire.lab.studies.alignguard_lora.network import teach
from guywire.lab.studies.alignguard_lora.page import CHECKS, NOTES, PLOTS
from guywire.lab.studies.bench import Bench
from guywire.lab.studies.study import Study

__all__ = ["STUDY", "choose", "learn", "run", "teach"]

SETTINGS: dict[str, Any] = {
    # The data and the model.
    "vocabulary": 1500,
    "length": 28,
    "evaluated": 900,
    "width": 64,
    "layers": 3,
    "heads": 4,
    # The aligned model.
    "start_rate": 3e-3,
    "start_steps": 400,
    "start_batch": 48,
    "refused_share": 0.12,
    # Fine-tuning.
    "rank": 8,
    "steps": 200,
    "batch": 16,
    "alignment": 256,
    "curve": [25, 50, 100, 200, 400],
    # How the rate and the strengths are chosen.
    "rates": [1e-3, 3e-3, 1e-2],
    "strengths": [1e-3, 1e-2, 1e-1],
    "given_up": 0.2,
    "refine": 2,
    "widen": 1,
}

SMOKE: dict[str, Any] = {
    "evaluated": 30,
    "start_steps": 8,
    "steps": 2,
    "alignment": 16,
    "curve": [1, 2, 3],
    "rates": [1e-3, 3e-3],
    "strengths": [1e-2, 1e-1],
    "refine": 0,
    "widen": 0,
}

_TUNING = (1000,)
"""The seed that chooses; none of the runs has its factors, order or alignment prompts."""


def run(bench: Bench) -> None:
    """Teach, choose the rate and the strengths, and run every arm for every seed.

    Args:
        bench: of the runner.
    """
    s = bench.settings
    taught = bench.run(bench.units(teach, [BASE], seeds=[0]))
    rate = bench.choose(
        choose,
        {"plain": {"arm": "plain"}},
        s["rates"],
        metric="valid loss",
        argument="rate",
        seeds=_TUNING,
        widen=s["widen"],
        tolerance=0.005,
    )["plain"]
    start = next(row["value"] for row in taught if row["metric"] == "valid loss")
    reached = rate.scores[rate.best]
    target = reached + s["given_up"] * (start - reached)
    strengths = _strengths(bench, rate.best, target)
    for arm in ("full, no geodesic", "full, no Riemannian"):
        strengths[arm] = strengths["full"]
    common = {"rate": rate.best}
    bench.run(
        bench.units(
            learn,
            {
                arm: {"arm": arm, "strength": strengths.get(arm, 0.0), **common}
                | ({"curve": True} if arm in ("plain", "full") else {})
                for arm in ARMS
            },
        )
    )


def _strengths(bench: Bench, rate: float, target: float) -> dict[str, float]:
    """Choose strengths with which all arms come to the same validation loss."""
    conditions = {arm: {"arm": arm, "rate": rate, "target": target} for arm in HELD}

    def chosen(arms: Mapping[str, Mapping[str, Any]], grid: Sequence[float], widen: int) -> Any:
        return bench.choose(choose, arms, grid, metric="off target", seeds=_TUNING, widen=widen)

    choices = chosen(conditions, bench.settings["strengths"], bench.settings["widen"])
    for _ in range(bench.settings["refine"]):
        for arm, arguments in conditions.items():
            grid = sorted(choices[arm].scores)
            # These units have run: what they left is read again, with its sign.
            losses = [_loss(bench, arm, {**arguments, "strength": value}) for value in grid]
            between = crossing(grid, losses, target)
            if between is not None:
                choices |= chosen({arm: arguments}, [*grid, between], 0)
    return {arm: choice.best for arm, choice in choices.items()}


def _loss(bench: Bench, arm: str, arguments: Mapping[str, Any]) -> float:
    rows = bench.run(bench.units(choose, {arm: arguments}, seeds=_TUNING), record=False)
    return next(row["value"] for row in rows if row["metric"] == "valid loss")


def crossing(strengths: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Return the strength at which the loss meets its target, by interpolation.

    Args:
        strengths: rising.
        losses: with each.
        target: the loss to meet.

    Returns:
        A strength between the last that stays below the target and the next, by straight lines over
        the logarithm; ``None`` if none of them crosses it or the answer is one of them.

    Example:
        >>> crossing([0.01, 0.1, 1.0], [1.0, 1.0, 2.0], 1.5)
        0.316228
    """
    for i in reversed(range(len(strengths) - 1)):
        if losses[i] < target < losses[i + 1]:
            share = (target - losses[i]) / (losses[i + 1] - losses[i])
            low, high = math.log(strengths[i]), math.log(strengths[i + 1])
            found = float(f"{math.exp(low + share * (high - low)):.6g}")
            return None if found in strengths else found
    return None


def _inputs(settings: Mapping[str, Any]) -> list[Path]:
    return [streams.data_folder() / "kjv.txt.gz"]


STUDY = Study(
    slug="alignguard-lora",
    title="AlignGuard-LoRA: Alignment-Preserving Fine-Tuning via Fisher-Guided Decomposition and "
    "Riemannian-Geodesic Collision Regularization",
    paper="Amitava Das, Abhilekh Borah, Vinija Jain, Aman Chadha; 2025; arXiv 2508.02079",
    summary="A language model of 0.26 million parameters learns to finish verses, and to refuse where "
    "they speak of violence or death. It is fine-tuned with LoRA on letters of the New Testament "
    "without such verses: plainly, held by L2, by a diagonal penalty, and by AlignGuard-LoRA whole "
    "and in parts, at strengths that come to the same loss on the new domain.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=5.0,
    code=(
        *(
            f"guywire.lab.studies.alignguard_lora.{part}"
            for part in ("arms", "finetune", "network", "texts")
        ),
        "guywire.lab.studies.fisher_sequential_transfer.text_pairs",
    ),
    packages=("transformers", "peft"),
    inputs=_inputs,
    notes=NOTES,
)
