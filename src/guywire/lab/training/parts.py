"""The ingredients of methods: a table made of the library's public exports.

Each part names a class of ``guywire``, and all that ``guywire methods`` prints stands on that class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import guywire
from guywire.core.regularizer import Regularizer
from guywire.lab.training import adapters

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True)
class Part:
    """One ingredient of a method.

    Attributes:
        name: in ``--methods``.
        kind: ``baseline`` (the loop does it) or ``method`` (a regularizer of the library).
        summary: what it does, in a line.
        when: when to use it, and when not.
        export: the class's public name in ``guywire``; empty for baselines.
        defaults: options that differ from the class's own defaults.
        alone: it cannot be combined with others.
        adapted: it trains LoRA adapters and the head, and takes the options of those as well.
        ranges: option to the lowest and the highest value that a sweep tries, if it is told nothing
            else, evenly spaced on a logarithmic scale.
        own_loop: it wants a model or data that ``compare`` does not have: for a loop of one's own.
    """

    name: str
    kind: str
    summary: str
    when: str
    export: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    adapted: bool = False
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    own_loop: bool = False

    @property
    def extra(self) -> dict[str, tuple[type, Any, str]]:
        """Options of the loop rather than of the class: kind, default and meaning."""
        return adapters.OPTIONS if self.adapted else {}

    @property
    def cls(self) -> type[Regularizer] | None:
        """The regularizer's class, ``None`` for a baseline."""
        return getattr(guywire, self.export) if self.export else None


# How the strengths were chosen: on the default stream, model, loss and training, by the accuracy on
# *validation* data (a fifth of each task's training data), mean of three seeds that no default run
# uses. In per cent, where plain training has 38.6:
#   l2 0.001 44.6, 0.01 47.0, 0.1 49.9, 1 46.9, 10 39.4;
#   l1 0.00001 41.3, 0.0001 44.0, 0.001 48.0, 0.01 41.8, 0.1 34.5;
#   ewc 1 39.3, 10 40.0, 100 41.8, 1000 37.4, 10000 35.2;
#   lwf 0.1 41.5, 0.3 41.8, 1 43.1, 3 44.3, 10 44.4, 30 43.4;
#   feature-distillation 0.0001 41.8, 0.001 43.1, 0.01 37.3, 0.1 30.2, 1 24.2.
# Replay's capacity is a budget and was not tuned: 100 samples are 8% of the data.
_ALL = (
    Part(
        "finetune",
        "baseline",
        "train on, hold nothing",
        "The floor: what forgetting costs when nothing is done about it.",
        alone=True,
    ),
    Part(
        "frozen",
        "baseline",
        "freeze the backbone, train the head",
        "Nothing of the backbone is forgotten, nothing is learnt either. The backbone is frozen "
        "from the start if it is pretrained, and after the first task if it is not.",
    ),
    Part(
        "lora",
        "baseline",
        "train LoRA adapters and the head only",
        "When full fine-tuning is too dear: few weights move, and the pretrained ones stay as they "
        "are. It forgets all the same: the adapters move from task to task.",
        adapted=True,
    ),
    Part(
        "joint",
        "baseline",
        "train on the data of all tasks so far",
        "The ceiling: what could be learnt if all data stayed at hand. The model goes on from task "
        "to task, so that the last one sees all data for as many epochs as any task.",
        alone=True,
    ),
    Part(
        "l2",
        "method",
        "pull towards the last task's weights",
        "The cheapest thing that helps when the model is pretrained. From random weights it buys "
        "little: all weights are held alike.",
        "L2",
        {"strength": 0.1},
        ranges={"strength": (0.001, 10.0)},
    ),
    Part(
        "l1",
        "method",
        "pull towards the last task's weights, few of them moving",
        "As l2, when a sparse change of the weights is wanted.",
        "L1",
        {"strength": 0.001},
        ranges={"strength": (0.00001, 0.1)},
    ),
    Part(
        "ewc",
        "method",
        "pull towards the last task's weights, the important ones harder",
        "Where tasks share their outputs (task- and domain-incremental). In class-incremental "
        "streams no penalty on weights alone keeps old classes alive.",
        "EWC",
        {"strength": 100.0},
        ranges={"strength": (1.0, 10000.0)},
    ),
    Part(
        "hft",
        "method",
        "train a random half of the matrices in each task, another half in the next",
        "Full fine-tuning of a transformer with less of everything: the frozen half costs neither "
        "gradients nor optimiser states, and keeps what it knew.",
        "HalfFineTuning",
    ),
    Part(
        "i-lora",
        "method",
        "LoRA with old samples, held to the running average of itself; the average is used",
        "When adapters are trained through several tasks and some old samples may be kept.",
        "ILoRA",
        # A comparison's tasks are short: an average over 200 steps would hardly leave the start.
        {"capacity": 100, "decay": 0.95},
        adapted=True,
    ),
    Part(
        "pego",
        "method",
        "several LoRA adapters, orthogonal to the pretrained weights and to each other",
        "To fine-tune for domains not seen yet, from several that were.",
        "PEGO",
        {"group": 4, "rank": 2, "normalise": True},
        adapted=True,
    ),
    Part(
        "lwf",
        "method",
        "keep the previous model's predictions on new data",
        "When old data may not be kept. Kind sigmoid goes with --loss sigmoid (LwF.MC).",
        "PredictionDistillation",
        {"strength": 10.0},
        ranges={"strength": (0.1, 30.0)},
    ),
    Part(
        "feature-distillation",
        "method",
        "keep the previous model's features on new data",
        "To hold the representation rather than the outputs; the head must be helped otherwise.",
        "FeatureDistillation",
        {"strength": 0.001},
        ranges={"strength": (0.0001, 1.0)},
    ),
    Part(
        "replay",
        "method",
        "keep some old samples and train on them again",
        "Whenever a few old samples may be kept: it is hard to beat.",
        "Replay",
        {"capacity": 100},
    ),
    Part(
        "gem",
        "method",
        "keep some old samples and never step against their gradient",
        "As replay, where a loss that rises on old samples is not acceptable; costs a backward "
        "pass for every old task at every step.",
        "GEM",
    ),
    Part(
        "adamr",
        "method",
        "Adam with a decay towards the pretrained weights",
        "Before a merge or a compressed delta: what is fine-tuned so can lose up to 99 % of its "
        "changes at random (guywire merge). Wants Adam or AdamW.",
        "AdamR",
    ),
    Part(
        "alignguard-lora",
        "method",
        "LoRA held where alignment data are sensitive, in two branches kept apart",
        "To fine-tune with LoRA without undoing trained-in refusals; needs some of their data.",
        "AlignGuardLoRA",
        own_loop=True,
    ),
    Part(
        "pela",
        "method",
        "low-rank factors in place of weights, repaired by the original's block outputs",
        "To make a pretrained model smaller and faster once, before it is fine-tuned.",
        "PELA",
        own_loop=True,
    ),
    Part(
        "sara",
        "method",
        "train only the smallest weights, at low rank",
        "To fine-tune a large model, a diffusion model say, in the memory of a few of its weights.",
        "SaRA",
        own_loop=True,
    ),
    Part(
        "mask-tuning",
        "method",
        "learn which pretrained weights to switch off",
        "Few-shot learning with a CLIP-like model whose zero-shot classes must survive; the result "
        "is one bit a weight.",
        "MaskTuning",
        own_loop=True,
    ),
)

PARTS: dict[str, Part] = {
    part.name: part for part in _ALL if not part.export or part.export in guywire.__all__
}
"""Every ingredient by name."""
