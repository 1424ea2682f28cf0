"""The units: pretrain once, then adapt to a few drawings in a style that pretraining never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import guywire as gw
from guywire.core.checkpoint import load, save
from guywire.core.errors import need
from guywire.lab import streams
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.mask_tuning.pictures import (
    KNOWN,
    NEW,
    Pictures,
    Words,
    augmented,
    read,
    shown,
)
from guywire.lab.studies.mask_tuning.towers import build, pretrain, prompt
from guywire.lab.studies.study import Work
from guywire.methods.sparsity import ZeroShotClassifier, text_features
from guywire.methods.sparsity.masks import masks_of

__all__ = ["adapt", "pretrain_towers", "random_like"]

_START = "mask-tuning-start.safetensors"
_MOST_OFF = 0.1
_MLP_TOO = [
    "vision_model.*_proj.weight",
    "vision_model.*patch_embedding.weight",
    "vision_model.*.fc?.weight",
]


def pretrain_towers(work: Work) -> list[dict[str, Any]]:
    """Train the towers on two styles; leave weights, drawings and what is held out.

    Args:
        work: of the study.

    Returns:
        The loss of each epoch, and rows of what the towers know then: ``trained`` and ``held``, the
        accuracy over the downstream classes on emoji that were trained on and on those held out.
    """
    s = work.settings
    pictures = read(streams.data_folder() / "renditions.parquet", s["side"])
    classes, held = _held_out(pictures, s, work.generator("held out"))
    seen = torch.tensor(sorted(set(range(len(pictures.captions))) - set(held.tolist())))
    texts = [pictures.captions[e] for e in seen.tolist()]
    words = Words.of([*texts, *map(prompt, pictures.groups)], s["text_length"])
    rows = pictures.rows(styles=KNOWN, emoji=seen)
    model: Any = build(s, words.size, work.generator("network"))
    losses = pretrain(model, pictures, rows, words, s, work.generator("pretraining"))
    save(
        work.leaves(_START),
        {
            "weights": {k: v.detach() for k, v in model.state_dict().items()},
            "pictures": vars(pictures),
            "words": words.words,
            "length": words.length,
            "classes": classes,
            "held": held,
        },
    )
    head = _classifier(model.eval(), words, pictures, classes)
    return [
        *(work.row("loss", loss, step=i + 1) for i, loss in enumerate(losses)),
        work.row("trained", _accuracy(head, pictures, classes, KNOWN, seen)),
        work.row("held", _accuracy(head, pictures, classes, KNOWN, held)),
    ]


def adapt(
    work: Work,
    *,
    arm: str,
    rate: float = 1e-3,
    strength: float = 1.0,
    wide: bool = False,
    style: str = NEW,
    tune: bool = False,
) -> list[dict[str, Any]]:
    """Adapt the pretrained towers to the base classes in a new style.

    Args:
        work: of the study.
        arm: ``zero-shot``, ``probe``, ``full``, ``lora`` or ``masks``.
        rate: the learning rate at its highest.
        strength: of gradient dropout, for ``masks``.
        wide: mask the MLPs too.
        style: the new style.
        tune: train on some of the shots and measure on the others, instead of on held-out emoji.

    Returns:
        Rows: with ``tune`` ``score`` (accuracy on the shots left out; 0 for masks that switch off a
        tenth or more) and ``off``; else ``base`` (accuracy over the base classes in the new
        style), ``new`` (over the other classes), ``kept`` (over all of them in the styles of
        pretraining) and, for masks, ``off`` (the share switched off) and the same of random masks
        that switch off as many weights of each tensor.
    """
    s = work.settings
    start = _start(work.folder / _START)
    task = _task(start, style, work, tune=tune)
    pictures, words = task.pictures, start["words"]
    model = build(s, words.size, work.generator("network"))
    model.load_state_dict(start["weights"])
    model.eval().requires_grad_(False)
    head = _classifier(model, words, pictures, task.base)
    if arm == "probe":
        return [work.row("score" if tune else "base", _probe(head, task, rate, s))]
    if arm != "zero-shot":
        moving, term = _moving(arm, model, head, strength, wide, work)
        _fit(head, moving, term, task, rate, s, work.generator("order"))
    if tune:
        score = _right(head, pictures, task.measured, task.base)
        off = gw.mask_report(model).share if arm == "masks" else 0.0
        return [work.row("off", off), work.row("score", score if off < _MOST_OFF else 0.0)]

    def measured(condition: str) -> list[dict[str, Any]]:
        others = _classifier(model, words, pictures, task.new)
        every = _classifier(model, words, pictures, start["classes"])
        found = {
            "base": _right(head, pictures, task.measured, task.base),
            "new": _accuracy(others, pictures, task.new, [style], start["held"]),
            "kept": _accuracy(every, pictures, start["classes"], KNOWN, start["held"]),
        }
        return [work.row(k, v, condition=condition) for k, v in found.items()]

    if arm != "masks":
        return measured(work.condition)
    masks = masks_of(model)
    found = [work.row("off", gw.mask_report(model).share), *measured(work.condition)]
    model = gw.unmask(model)
    gw.apply_mask(model, random_like(masks, work.generator("random masks")))
    return [*found, *measured(f"random as {work.condition}")]


def random_like(masks: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return random masks that switch off as many weights of each tensor.

    Args:
        masks: names to boolean tensors.
        generator: of the draws.

    Returns:
        The same names and shapes.
    """
    return {
        name: on.reshape(-1)[torch.randperm(on.numel(), generator=generator)].reshape(on.shape)
        for name, on in masks.items()
    }


def _moving(
    arm: str, model: nn.Module, head: nn.Module, strength: float, wide: bool, work: Work
) -> tuple[list[nn.Parameter], gw.Regularizer | None]:
    """Make the model ready for an arm: what moves, and what is attached."""
    clip: Any = model
    if arm == "full":
        parts = [*clip.vision_model.parameters(), *clip.visual_projection.parameters()]
        for p in parts:
            p.requires_grad_(True)
        return parts, None
    if arm == "lora":
        peft = need("peft", extra="adapters")
        config = peft.LoraConfig(
            r=work.settings["lora_rank"],
            lora_alpha=2 * work.settings["lora_rank"],
            target_modules=["q_proj", "v_proj"],
        )
        with seeded(work.generator("lora")):
            peft.inject_adapter_in_model(config, clip.vision_model)
        return [p for p in head.parameters() if p.requires_grad], None
    assert arm == "masks", arm
    scores = gw.mask(head, _MLP_TOO if wide else None)
    norm = work.settings["norm"]
    return list(scores.values()), gw.MaskTuning(strength, norm=norm, seed=work.number("dropout"))


def _fit(
    head: nn.Module,
    moving: Sequence[nn.Parameter],
    term: gw.Regularizer | None,
    task: _Task,
    rate: float,
    s: Mapping[str, Any],
    generator: torch.Generator,
) -> None:
    # The rate falls to 0 along a cosine; the last step counts, none is selected.
    optimizer = torch.optim.Adam(moving, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s["steps"])
    images = task.pictures.images[task.rows]
    labels = _labels(task.pictures, task.rows, task.base)
    with gw.attach(head, optimizer, [] if term is None else term) as wires:
        queue = torch.empty(0, dtype=torch.long)
        for _ in range(s["steps"]):
            while len(queue) < s["batch"]:
                queue = torch.cat([queue, torch.randperm(len(labels), generator=generator)])
            picked, queue = queue[: s["batch"]], queue[s["batch"] :]
            x, y = shown(augmented(images[picked], generator)), labels[picked]
            outputs = head(x)
            loss = F.cross_entropy(outputs, y) + wires.loss((x, y), outputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _probe(head: Any, task: _Task, rate: float, s: Mapping[str, Any]) -> float:
    """Train a linear layer on the image features and return its accuracy; it knows no other class."""

    def features(rows: Tensor) -> Tensor:
        with torch.no_grad():
            pooled = head.vision_model(pixel_values=shown(task.pictures.images[rows])).pooler_output
            return F.normalize(head.visual_projection(pooled), dim=-1)

    known, labels = features(task.rows), _labels(task.pictures, task.rows, task.base)
    weight = torch.zeros(len(task.base), known.shape[1], requires_grad=True)
    bias = torch.zeros(len(task.base), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=rate)
    steps = 3 * s["steps"]  # from zero, and at no cost
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = F.cross_entropy(F.linear(known, weight, bias), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    logits = F.linear(features(task.measured), weight, bias).detach()
    right = logits.argmax(1) == _labels(task.pictures, task.measured, task.base)
    return float(right.double().mean())


def _held_out(
    pictures: Pictures, s: Mapping[str, Any], generator: torch.Generator
) -> tuple[list[int], Tensor]:
    """Choose the downstream classes, the largest subgroups, and hold out emoji of each."""
    groups = torch.zeros(len(pictures.captions), dtype=torch.long)
    groups[pictures.emoji] = pictures.group
    sizes = torch.bincount(groups, minlength=len(pictures.groups))
    classes = sizes.argsort(descending=True, stable=True)[: s["classes"]].tolist()
    held = []
    for one in classes:
        emoji = (groups == one).nonzero().squeeze(1)
        count = min(int(s["held_share"] * len(emoji)), s["held_most"])
        held.append(emoji[torch.randperm(len(emoji), generator=generator)[:count]])
    return classes, torch.cat(held)


@dataclass(frozen=True)
class _Task:
    """A few drawings of some classes in a new style.

    Attributes:
        pictures: all drawings.
        base: the classes that are trained on.
        new: the others.
        rows: drawings to train on, never of held-out emoji.
        measured: drawings of the base classes to measure on: of held-out emoji, or to tune, of
            emoji that are neither held out nor trained on.
    """

    pictures: Pictures
    base: list[int]
    new: list[int]
    rows: Tensor
    measured: Tensor


def _task(start: Mapping[str, Any], style: str, work: Work, *, tune: bool) -> _Task:
    s, pictures, held = work.settings, start["pictures"], start["held"]
    order = torch.randperm(len(start["classes"]), generator=work.generator("classes")).tolist()
    half = len(order) // 2
    base, new = ([start["classes"][i] for i in part] for part in (order[:half], order[half:]))
    generator = work.generator("shots")
    train, left_out = [], []
    for one in base:
        rows = pictures.rows(styles=[style], groups=[one])
        rows = rows[~torch.isin(pictures.emoji[rows], held)]
        rows = rows[torch.randperm(len(rows), generator=generator)][: s["shots"]]
        cut = s["valid_shots"] if tune else 0
        left_out.append(rows[:cut])
        train.append(rows[cut:])
    tested = pictures.rows(styles=[style], emoji=held, groups=base)
    return _Task(pictures, base, new, torch.cat(train), torch.cat(left_out) if tune else tested)


def _classifier(
    model: Any, words: Words, pictures: Pictures, classes: Sequence[int]
) -> ZeroShotClassifier:
    texts = words([prompt(pictures.groups[c]) for c in classes])
    return ZeroShotClassifier(model, text_features(model, texts))


def _labels(pictures: Pictures, rows: Tensor, classes: Sequence[int]) -> Tensor:
    numbers = torch.full((len(pictures.groups),), -1)
    numbers[list(classes)] = torch.arange(len(classes))
    return numbers[pictures.group[rows]]


def _accuracy(
    head: nn.Module,
    pictures: Pictures,
    classes: Sequence[int],
    styles: Sequence[str],
    emoji: Tensor,
) -> float:
    rows = pictures.rows(styles=styles, emoji=emoji, groups=classes)
    return _right(head, pictures, rows, classes)


def _right(head: nn.Module, pictures: Pictures, rows: Tensor, classes: Sequence[int]) -> float:
    with torch.no_grad():
        logits = torch.cat([head(shown(pictures.images[part])) for part in rows.split(256)])
    return float((logits.argmax(1) == _labels(pictures, rows, classes)).double().mean())


@lru_cache(maxsize=1)
def _start(path: Path) -> dict[str, Any]:
    start: Any = load(path)
    pictures = start["pictures"]
    start["pictures"] = Pictures(**pictures)
    start["words"] = Words(start["words"], start["length"])
    return start
