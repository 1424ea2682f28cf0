"""Half fine-tuning in miniature: a small Llama that read stories, and a stream of other books."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guywire.lab.studies.bench import Bench
from guywire.lab.studies.half_fine_tuning import texts
from guywire.lab.studies.half_fine_tuning.claims import CHECKS, CLAIMS, NOTES, PLOTS
from guywire.lab.studies.half_fine_tuning.loop import learn, pretrain, reset
from guywire.lab.studies.study import Study

__all__ = ["STUDY", "learn", "pretrain", "reset", "run"]

SETTINGS: dict[str, Any] = {
    "vocabulary": 512,
    "length": 64,
    "width": 64,
    "layers": 4,
    "batch": 16,
    "base_steps": 900,
    "base_rate": 4e-3,
    "steps": 30,
    "looks": 5,
    "look_rows": 64,
    "test_rows": 160,
    "rates": [1e-3, 3e-3, 1e-2],
    "lora_rates": [3e-3, 1e-2, 3e-2],
    "strengths": [0.01, 0.1, 1.0],
    "widen": 2,
}

SMOKE: dict[str, Any] = {
    "width": 32,
    "layers": 2,
    "base_steps": 10,
    "steps": 4,
    "looks": 2,
    "look_rows": 4,
    "test_rows": 8,
    "rates": [1e-3, 3e-3],
    "lora_rates": [3e-3, 1e-2],
    "strengths": [0.1, 1.0],
    "widen": 0,
}


def run(bench: Bench) -> None:
    """Train the base, choose rates, take every arm and seed through the stream.

    Args:
        bench: of the runner.
    """
    s = bench.settings
    bench.run(bench.units(pretrain, ["base"], seeds=[0], cost=10.0))
    # On a seed of its own: neither its batches nor its halves are those of the runs.
    tuning: dict[str, Any] = {"metric": "valid_bits", "seeds": [1000], "widen": s["widen"]}
    found = bench.choose(
        learn,
        {arm: {"arm": arm, "tune": True} for arm in ("FFT", "HFT")},
        s["rates"], argument="rate", tolerance=0.002, **tuning,
    ) | bench.choose(
        learn, {"LoRA": {"arm": "LoRA", "tune": True}},
        s["lora_rates"], argument="rate", tolerance=0.002, **tuning,
    )  # fmt: skip
    rates = {arm: choice.best for arm, choice in found.items()}
    l2 = {"arm": "L2", "rate": rates["FFT"]}
    strength = bench.choose(
        learn, {"L2": {**l2, "tune": True}}, s["strengths"],
        tolerance=0.002, **{**tuning, "metric": "valid_both"},
    )["L2"].best  # fmt: skip
    arms: dict[str, dict[str, Any]] = {
        "FFT": {"rate": rates["FFT"]},
        "FFT, half the steps": {"rate": rates["FFT"]},
        "HFT": {"rate": rates["HFT"]},
        "HFT, layers": {"rate": rates["HFT"]},
        "HFT, model": {"rate": rates["HFT"]},
        "LoRA": {"rate": rates["LoRA"]},
        "L2": {"rate": rates["FFT"], "strength": strength},
    }
    bench.run(bench.units(learn, {arm: {"arm": arm, **words} for arm, words in arms.items()}))
    bench.run(bench.units(reset, ["Half-Reset"]))


def _inputs(settings: Mapping[str, Any]) -> list[Path]:
    return texts.files()


STUDY = Study(
    slug="half-fine-tuning",
    title="HFT: Half Fine-Tuning for Large Language Models",
    paper="Tingfeng Hui, Zhenyu Zhang, Shuohuan Wang, Weiran Xu, Yu Sun, Hua Wu; ACL 2025; "
    "arXiv 2404.18466",
    summary="A small Llama-style model learns the narrative books of the King James Bible, then in "
    "turn its songs, prophets, gospels and letters, with all of its parameters, with a random half "
    "by category, by layer or over the whole model, with LoRA, and with L2 to its start. What it "
    "loses of the stories, and of earlier kinds of books, is measured on held-out chapters.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=4.0,
    code=tuple(f"guywire.lab.studies.half_fine_tuning.{part}" for part in ("loop", "texts")),
    packages=("transformers", "tokenizers", "peft"),
    inputs=_inputs,
    notes=NOTES,
)
