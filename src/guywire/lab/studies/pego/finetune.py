"""Fine-tune on three styles, one way or another, and look at the fourth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import guywire as gw
from guywire.lab.studies.pego.data import STYLES, Emoji, Parts, augmented, floats, parts
from guywire.lab.studies.pego.network import ViT, accuracy, features, pretrained
from guywire.lab.studies.study import Work
from guywire.methods.adapters._lora import Site, sites

__all__ = ["ARMS", "learn", "tune"]

ARMS = ("probe", "full", "LoRA", "group", "preserve", "diversify", "PEGO")
"""A linear classifier alone; all weights; one LoRA of the group's size; a group without penalty, with
one of the two terms, with both."""

_TARGETS = ["q_proj", "v_proj"]
_RIDGE = 0.01  # in units of a feature's variance


def tune(
    work: Work, *, arm: str, left_out: str, rate: float = 0.0, strength: float = 0.0
) -> list[dict[str, Any]]:
    """Fine-tune with one style left out, and measure on validation data of the others only.

    Args:
        work: of the study.
        arm: of ``ARMS``.
        left_out: the style that is not there.
        rate: of the body.
        strength: of the penalty.

    Returns:
        One row, ``validation loss``.
    """
    cut = parts(work.settings, work.seed)
    model = _tuned(work, cut.train, arm, left_out, rate, strength)
    loss, _ = _validation(model, cut.valid, left_out)
    return [work.row("validation loss", loss)]


def learn(
    work: Work, *, arm: str, rates: Mapping[str, float], strengths: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Fine-tune four times, each style left out once, and test on the one left out.

    Args:
        work: of the study.
        arm: of ``ARMS``.
        rates: of the body, by the style left out.
        strengths: of the penalty, likewise.

    Returns:
        Rows: ``unseen`` (accuracy on held-out emoji in the style left out, its mean and style by
        style), ``seen`` (the same emoji in the other styles), ``source validation``, ``old``
        (accuracy of a linear classifier for the pretraining's subgroups on the tuned features),
        and of adapters ``preserve``, ``diversify`` (the sums of absolute products, before any
        strength), ``merge error`` (largest difference of a logit).
    """
    cut = parts(work.settings, work.seed)
    found: dict[str, list[float]] = {}
    for left_out in STYLES:
        model = _tuned(
            work, cut.train, arm, left_out, rates.get(left_out, 0.0), strengths.get(left_out, 0.0)
        )
        for name, value in _measured(model, cut, arm, left_out, work.settings["most_old"]).items():
            found.setdefault(name, []).append(value)
    rows = [
        work.row(f"unseen, {style}", value)
        for style, value in zip(STYLES, found["unseen"], strict=True)
    ]
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return [*rows, *(work.row(name, value) for name, value in means.items())]


def _tuned(work: Work, train: Emoji, arm: str, left_out: str, rate: float, strength: float) -> ViT:
    s = work.settings
    model = pretrained(work, len(train.names))
    _dress(model, arm, s["modules"], s["rank"], work.generator("adapters"))
    body = [p for p in model.body.parameters() if p.requires_grad]
    groups = [{"params": list(model.head.parameters()), "lr": s["head_rate"]}]
    if body:
        groups.append({"params": body, "lr": rate})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s["steps"])
    draw = work.generator(f"batches without {left_out}")  # the same for all arms
    sources = [i for i, style in enumerate(STYLES) if style != left_out]
    with gw.attach(model, optimizer, _penalty(arm, strength)):
        for _ in range(s["steps"]):
            images, labels = _batch(train, sources, s["batch"], draw)
            loss = functional.cross_entropy(model(augmented(floats(images), draw)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def _dress(model: ViT, arm: str, modules: int, rank: int, generator: torch.Generator) -> None:
    if arm == "probe":
        model.body.requires_grad_(False)
    elif arm == "LoRA":
        gw.lora_group(model.body, 1, modules * rank, target_modules=_TARGETS, generator=generator)
    elif arm != "full":
        gw.lora_group(model.body, modules, rank, target_modules=_TARGETS, generator=generator)


def _penalty(arm: str, strength: float) -> list[gw.Regularizer]:
    terms = {"preserve": (1.0, 0.0), "diversify": (0.0, 1.0), "PEGO": (1.0, 1.0)}
    if arm not in terms:
        return []
    preserve, diversify = terms[arm]
    return [gw.PEGO(strength, preserve=preserve, diversify=diversify)]


def _batch(
    train: Emoji, sources: list[int], size: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw as many drawings from each source style."""
    chosen = [torch.randint(len(train), (size,), generator=draw) for _ in sources]
    images = torch.cat([train.images[at, i] for at, i in zip(chosen, sources, strict=True)])
    return images, train.labels[torch.cat(chosen)]


def _validation(model: ViT, valid: Emoji, left_out: str) -> tuple[float, float]:
    """Return the mean cross entropy and the accuracy over the source styles."""
    losses, right = [], []
    for number, style in enumerate(STYLES):
        if style == left_out:
            continue
        images, labels = valid.style(number)
        with torch.no_grad():
            logits = model.head(features(model, images))
        losses.append(float(functional.cross_entropy(logits, labels)))
        right.append(float((logits.argmax(1) == labels).double().mean()))
    return sum(losses) / len(losses), sum(right) / len(right)


def _measured(model: ViT, cut: Parts, arm: str, left_out: str, most_old: int) -> dict[str, float]:
    number = STYLES.index(left_out)
    others = [i for i in range(len(STYLES)) if i != number]
    unseen, labels = cut.test.style(number)
    values = {
        "unseen": accuracy(model, unseen, labels),
        "seen": sum(accuracy(model, *cut.test.style(i)) for i in others) / len(others),
        "source validation": _validation(model, cut.valid, left_out)[1],
        "old": _old(model, cut, most_old),
    }
    if arm in ("probe", "full"):
        return values
    layers: dict[str, list[Site]] = {}
    for site in sites(model):
        layers.setdefault(site.name, []).append(site)
    with torch.no_grad():
        each = [
            (found[0].base, [s.A for s in found], [s.B for s in found]) for found in layers.values()
        ]
        values["preserve"] = sum(float(gw.preserve_loss(w, a, b)) for w, a, b in each)
        values["diversify"] = sum(float(gw.diversify_loss(a, b)) for _, a, b in each)
        before = model(floats(unseen))
        gw.merge_lora_group(model.body)
        values["merge error"] = float((model(floats(unseen)) - before).abs().max())
    return values


def _old(model: ViT, cut: Parts, most: int) -> float:
    """Fit ridge regression to the pretraining's subgroups on features, and test it on other emoji.

    Each emoji is shown in one style, all styles equally often.
    """
    seen, unseen = (_some(emoji, most) for emoji in (cut.old, cut.old_test))
    x, y = (
        features(model, e.images[torch.arange(len(e)), torch.arange(len(e)) % len(STYLES)])
        for e in (seen, unseen)
    )
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, y = (((f - mean) / scale).double() for f in (x, y))
    targets = functional.one_hot(seen.labels, len(seen.names)).double()
    share = targets.mean(0)
    penalty = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ (targets - share))
    return float(((y @ weights + share).argmax(1) == unseen.labels).double().mean())


def _some(emoji: Emoji, most: int) -> Emoji:
    """Keep every so many."""
    return emoji.subset(torch.arange(0, len(emoji), -(-len(emoji) // most)))
