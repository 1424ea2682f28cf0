"""Mask tuning in miniature: which weights of a small CLIP to switch off for a new style.

A two-tower model learns drawings of emoji and their captions in two styles. Then 16 drawings a
class in a third style adapt it, by masks with and without gradient dropout, LoRA, full fine-tuning
or a probe, and it is measured on held-out emoji: classes trained on, classes that were not, and the
styles of pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guywire.lab import streams
from guywire.lab.studies.bench import Bench
from guywire.lab.studies.mask_tuning.claims import CLAIMS
from guywire.lab.studies.mask_tuning.page import CHECKS, NOTES, PLOTS
from guywire.lab.studies.mask_tuning.pictures import LINE
from guywire.lab.studies.mask_tuning.tune import adapt, pretrain_towers
from guywire.lab.studies.study import Study

__all__ = ["STUDY", "adapt", "pretrain_towers", "run"]

SETTINGS: dict[str, Any] = {
    # The towers.
    "side": 32,
    "patch": 8,
    "width": 96,
    "heads": 4,
    "layers": 3,
    "text_layers": 1,
    "text_length": 16,
    "features": 64,
    "pretraining_epochs": 18,
    "pretraining_batch": 128,
    "pretraining_rate": 2e-3,
    # The task.
    "classes": 20,
    "held_share": 0.4,
    "held_most": 40,
    "shots": 16,
    "valid_shots": 4,
    "steps": 200,
    "batch": 8,
    "lora_rank": 4,
    "norm": 1e-4,
    "tuning_seeds": 2,
    "widen": 2,
}

SMOKE: dict[str, Any] = {
    "pretraining_epochs": 2,
    "classes": 6,
    "steps": 6,
    "tuning_seeds": 1,
    "widen": 0,
}

# The middle rate of masks moves a score by 2.6 times what it needs, were its gradient steady.
GRIDS: dict[str, tuple[float, ...]] = {
    "probe": (0.01, 0.1, 1.0),
    "full fine-tuning": (3e-5, 1e-4, 3e-4),
    "LoRA": (1e-3, 3e-3, 1e-2),
    "AMT": (8e-5, 1.3e-4, 2e-4),
    "R-AMT": (8e-5, 1.3e-4, 2e-4),
}

ARMS: dict[str, dict[str, Any]] = {
    "probe": {"arm": "probe"},
    "full fine-tuning": {"arm": "full"},
    "LoRA": {"arm": "lora"},
    "AMT": {"arm": "masks", "strength": 0.0},
    "R-AMT": {"arm": "masks", "strength": 1.0},
}


def run(bench: Bench) -> None:
    """Pretrain, choose learning rates, and adapt by every arm for every seed.

    Args:
        bench: of the runner.
    """
    bench.run(bench.units(pretrain_towers, ["pretraining"], seeds=[0]))
    rates = _rates(bench, ARMS, GRIDS)
    arms = {name: {**arguments, "rate": rates[name]} for name, arguments in ARMS.items()}
    arms["zero-shot"] = {"arm": "zero-shot"}
    arms["AMT, R-AMT's rate"] = {**arms["AMT"], "rate": rates["R-AMT"]}
    arms["R-AMT l=0.3"] = {**arms["R-AMT"], "strength": 0.3}
    arms["R-AMT, MLPs too"] = {**arms["R-AMT"], "wide": True}
    arms["line: zero-shot"] = {"arm": "zero-shot", "style": LINE}
    arms["line: R-AMT"] = {**arms["R-AMT"], "style": LINE}
    bench.run(bench.units(adapt, arms))


def _rates(
    bench: Bench,
    arms: Mapping[str, Mapping[str, Any]],
    grids: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    rates = {}
    for name, arguments in arms.items():
        choices = bench.choose(
            adapt,
            {name: {**arguments, "tune": True}},
            grids[name],
            metric="score",
            better="higher",
            argument="rate",
            seeds=range(1000, 1000 + bench.settings["tuning_seeds"]),
            widen=bench.settings["widen"],
            tolerance=0.01,
        )
        rates[name] = choices[name].best
    return rates


def _inputs(settings: Mapping[str, Any]) -> list[Path]:
    return [streams.data_folder() / "renditions.parquet"]


STUDY = Study(
    slug="mask-tuning",
    title="Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
    paper="Kecheng Zheng, Wei Wu, Ruili Feng, Kai Zhu, Jiawei Liu, Deli Zhao, Zheng-Jun Zha, Wei Chen, "
    "Yujun Shen; ICCV 2023; arXiv 2307.15049",
    summary="A small CLIP is trained on drawings of emoji in two styles and their captions. From 16 "
    "drawings a class in a third style, masks learn which of its attention weights to switch off, with "
    "and without gradient dropout; LoRA, full fine-tuning, a probe and random masks stand beside them. "
    "Measured on held-out emoji: base classes, new classes, and the styles of pretraining.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=3.0,
    code=tuple(
        f"guywire.lab.studies.mask_tuning.{part}" for part in ("pictures", "towers", "tune")
    ),
    packages=("transformers", "peft"),
    inputs=_inputs,
    notes=NOTES,
)
