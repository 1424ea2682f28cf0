"""Learn to preserve and diversify, in miniature: leave one style of drawing out.

A small vision transformer is pretrained on emoji of 83 subgroups in four styles. It then learns 13
other subgroups from three styles, and is tested on the fourth, on emoji that it has not seen: with a
linear classifier alone, with all weights free, with one LoRA, and with groups of LoRAs with and
without the two orthogonality terms. Each style is left out once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guywire.lab import streams
from guywire.lab.studies.bench import Bench
from guywire.lab.studies.pego.claims import CLAIMS
from guywire.lab.studies.pego.data import STYLES
from guywire.lab.studies.pego.finetune import ARMS, learn, tune
from guywire.lab.studies.pego.network import pretrain
from guywire.lab.studies.pego.page import CHECKS, NOTES, PLOTS
from guywire.lab.studies.study import Study

__all__ = ["STUDY", "learn", "pretrain", "run", "tune"]

SETTINGS: dict[str, Any] = {
    # The data.
    "side": 32,
    "most_per_class": 60,
    "test_fraction": 0.5,
    "valid_fraction": 0.3,
    # The network and its pretraining.
    "patch": 8,
    "width": 64,
    "layers": 4,
    "heads": 4,
    "start_rate": 2e-3,
    "start_batch": 64,
    "start_epochs": 40,
    # Fine-tuning.
    "modules": 4,
    "rank": 2,
    "batch": 12,  # of each style
    "steps": 80,
    "head_rate": 5e-3,
    "most_old": 2000,  # emoji of the pretraining that are looked at again
    # How rates and strengths are chosen.
    "full_rates": [3e-4, 1e-3, 3e-3],
    "lora_rates": [3e-3, 1e-2, 3e-2],
    "strengths": [1e-4, 1e-3, 1e-2],
    "widen": 1,
    "tolerance": 0.01,
}

SMOKE: dict[str, Any] = {
    "most_per_class": 8,
    "start_epochs": 1,
    "steps": 4,
    "most_old": 150,
    "full_rates": [1e-3, 3e-3],
    "lora_rates": [3e-3, 1e-2],
    "strengths": [1e-3, 1e-2],
    "widen": 0,
}

_TUNING = (1000, 1001)
"""Seeds that choose; their training and validation emoji are cut otherwise than those of the runs. Rates
are chosen on the first, strengths, on which more rests, on both."""


def run(bench: Bench) -> None:
    """Pretrain, choose rates and strengths, and run every arm for every seed.

    Args:
        bench: of the runner.
    """
    s = bench.settings
    bench.run(bench.units(pretrain, ["pretraining"], seeds=[0]))
    full = _chosen(bench, "full", "rate", s["full_rates"], {})
    lora = _chosen(bench, "LoRA", "rate", s["lora_rates"], {})
    strengths = _chosen(bench, "PEGO", "strength", s["strengths"], lora)
    rates = {"probe": dict.fromkeys(STYLES, 0.0), "full": full}
    held = ("preserve", "diversify", "PEGO")
    bench.run(
        bench.units(
            learn,
            {
                arm: {
                    "arm": arm,
                    "rates": rates.get(arm, lora),
                    "strengths": strengths if arm in held else {},
                }
                for arm in ARMS
            },
        )
    )


def _chosen(
    bench: Bench, arm: str, what: str, grid: list[float], rates: Mapping[str, float]
) -> dict[str, float]:
    """Choose a rate or a strength for each style left out, on validation data of the others."""
    conditions = {
        f"{arm}, {what}, without {style}": {"arm": arm, "left_out": style}
        | ({"rate": rates[style]} if rates else {})
        for style in STYLES
    }
    choices = bench.choose(
        tune,
        conditions,
        grid,
        metric="validation loss",
        argument=what,
        seeds=_TUNING if what == "strength" else _TUNING[:1],
        widen=bench.settings["widen"],
        tolerance=bench.settings["tolerance"],
    )
    return {style: choices[f"{arm}, {what}, without {style}"].best for style in STYLES}


def _inputs(settings: Mapping[str, Any]) -> list[Path]:
    return [streams.data_folder() / "renditions.parquet"]


STUDY = Study(
    slug="pego",
    title="Learn to Preserve and Diversify: Parameter-Efficient Group with Orthogonal Regularization "
    "for Domain Generalization",
    paper="Jiajun Hu, Jian Zhang, Lei Qi, Yinghuan Shi, Yang Gao; ECCV 2024; arXiv 2407.15085",
    summary="A small vision transformer, pretrained on emoji of 83 subgroups in four styles of "
    "drawing, learns 13 other subgroups from three styles and is tested on the fourth, each style "
    "left out once: a linear classifier, full fine-tuning, one LoRA, and groups of four LoRAs without "
    "a penalty, with either term of PEGO, and with both.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=4.0,
    code=tuple(f"guywire.lab.studies.pego.{part}" for part in ("data", "finetune", "network")),
    packages=("transformers", "peft"),
    inputs=_inputs,
    notes=NOTES,
)
