"""SaRA in miniature: a small diffusion model learns a new style of drawing with few of its weights.

A U-Net of 0.7M weights is trained to predict the noise on emoji drawn in black lines. It is then
fine-tuned on a coloured style with 5% of its weights: the smallest, the largest or random ones, with
and without the nuclear norm and the second choice; with LoRA of as many numbers; and whole. What it
gains on the new style and loses on the old one is its error on emoji that neither training saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guywire.lab import streams
from guywire.lab.studies.bench import Bench
from guywire.lab.studies.sara.arms import ARMS, fine_tune
from guywire.lab.studies.sara.claims import CLAIMS
from guywire.lab.studies.sara.network import pretrain, take_away
from guywire.lab.studies.sara.page import CHECKS, NOTES, PLOTS
from guywire.lab.studies.study import Study

__all__ = ["STUDY", "fine_tune", "pretrain", "run", "take_away"]

SETTINGS: dict[str, Any] = {
    # The data.
    "side": 16,
    "test_fraction": 0.2,
    "valid_fraction": 0.1,
    "evaluated": 192,
    # The network and its pretraining.
    "channels": [16, 32, 64],
    "noise_steps": 200,
    "start_rate": 2e-3,
    "start_batch": 32,
    "start_steps": 500,
    # What is taken away.
    "taken": 0.01,
    # Fine-tuning.
    "share": 0.05,
    "batch": 16,
    "steps": 80,
    "rank_above": 32,
    # How rates and strengths are chosen.
    "masked_rates": [1e-3, 3e-3, 1e-2],
    "lora_rates": [1e-3, 3e-3, 1e-2],
    "full_rates": [3e-4, 1e-3, 3e-3],
    "strengths": [1e-4, 1e-3, 1e-2],
    "widen": 2,
    "tolerance": 0.005,
}

SMOKE: dict[str, Any] = {
    "evaluated": 24,
    "start_steps": 12,
    "steps": 4,
    "masked_rates": [3e-3, 1e-2],
    "lora_rates": [3e-3, 1e-2],
    "full_rates": [1e-3, 3e-3],
    "strengths": [1e-3, 1e-2],
    "widen": 0,
}

_TUNING = (1000,)
"""The seed that chooses, on emoji kept for it; no run has it."""


def run(bench: Bench) -> None:
    """Pretrain, choose rates and the strength, and run every arm for every seed.

    Args:
        bench: of the runner.
    """
    s = bench.settings
    bench.run(bench.units(pretrain, ["pretraining"], seeds=[0]))
    masked = _chosen(bench, "no rank loss", "rate", s["masked_rates"], "masked rate")
    lora = _chosen(bench, "LoRA", "rate", s["lora_rates"], "LoRA rate")
    full = _chosen(bench, "full", "rate", s["full_rates"], "full rate")
    strength = _chosen(bench, "SaRA", "strength", s["strengths"], "rank strength", rate=masked)
    own = {"LoRA": {"rate": lora}, "full": {"rate": full}}
    arms = {
        arm: {"arm": arm, **own.get(arm, {"rate": masked, "strength": strength})} for arm in ARMS
    }
    bench.run([*bench.units(fine_tune, arms, cost=4.0), *bench.units(take_away, ["frozen"])])


def _chosen(
    bench: Bench, arm: str, argument: str, grid: list[float], name: str, **given: float
) -> float:
    """Choose a rate by what is learnt, a strength by what is learnt and lost, on validation emoji."""
    s = bench.settings
    choices = bench.choose(
        fine_tune,
        {name: {"arm": arm, "tune": True, **given}},
        grid,
        metric="target_left" if argument == "rate" else "balance",
        argument=argument,
        seeds=_TUNING,
        widen=s["widen"],
        tolerance=s["tolerance"],
    )
    return choices[name].best


STUDY = Study(
    slug="sara",
    title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank "
    "Adaptation",
    paper="Teng Hu, Jiangning Zhang, Ran Yi, Hongrui Huang, Yabiao Wang, Lizhuang Ma; ICLR 2025; "
    "arXiv 2409.06633",
    summary="A diffusion U-Net of 0.7M weights, trained on emoji in black lines at 16 x 16 pixels, is "
    "fine-tuned on a coloured style with 5% of its weights: the smallest (with and without the "
    "nuclear norm and the second choice half-way), the largest, random ones; with LoRA of as many "
    "numbers, and whole. Measured is the error of the predicted noise, on the new style and the old "
    "one, on emoji held out whole.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=5.0,
    code=tuple(f"guywire.lab.studies.sara.{part}" for part in ("arms", "network")),
    packages=("diffusers", "peft"),
    inputs=lambda settings: [_renditions()],
    notes=NOTES,
)


def _renditions() -> Path:
    return streams.data_folder() / "renditions.parquet"
