"""The vision transformer, and its pretraining on subgroups that the task does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from guywire.core.checkpoint import load, save
from guywire.core.errors import need
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.pego.data import STYLES, Emoji, augmented, floats, parts
from guywire.lab.studies.study import Work

__all__ = ["START", "ViT", "accuracy", "features", "pretrain", "pretrained"]

START = "pego-start.safetensors"

_TEMPERATURE = 0.2


class ViT(nn.Module):
    """A small vision transformer of ``transformers`` with a linear classifier on its class token.

    Args:
        settings: ``side``, ``patch``, ``width``, ``layers``, ``heads``.
        classes: of the classifier.
        generator: draws the weights.
    """

    def __init__(self, settings: Any, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        transformers = need("transformers", extra="hf")
        config = transformers.ViTConfig(
            image_size=settings["side"],
            patch_size=settings["patch"],
            hidden_size=settings["width"],
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["heads"],
            intermediate_size=3 * settings["width"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with seeded(generator):
            self.body = transformers.ViTModel(config, add_pooling_layer=False)
            self.head = nn.Linear(settings["width"], classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the class token of images.

        Args:
            images: float32 ``[N, 3, side, side]``.

        Returns:
            ``[N, width]``.
        """
        return self.body(pixel_values=images).last_hidden_state[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits.

        Args:
            images: float32 ``[N, 3, side, side]``.

        Returns:
            ``[N, classes]``.
        """
        return self.head(self.features(images))


def pretrain(work: Work) -> list[dict[str, Any]]:
    """Train on the other subgroups, in all styles; leave the body's weights.

    Two losses: the subgroup's name, and among all drawings of a batch the other style of the same
    emoji (as CLIP has to find the caption). The second is what makes features that cope with style.

    Args:
        work: of the study.

    Returns:
        Accuracies of the pretraining's own classifier on emoji that it has not seen, all styles and
        one by one.
    """
    s = work.settings
    cut = parts(s, 0)
    model = ViT(s, len(cut.old.names), work.generator("network"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["start_rate"], weight_decay=0.05)
    steps = s["start_epochs"] * (len(cut.old) // s["start_batch"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=s["start_rate"], total_steps=steps, pct_start=0.1
    )
    draw = work.generator("pretraining")
    for _ in range(s["start_epochs"]):
        order = torch.randperm(len(cut.old), generator=draw)
        for at in order[: len(order) // s["start_batch"] * s["start_batch"]].split(
            s["start_batch"]
        ):
            loss = _pair_loss(model, cut.old, at, draw)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save(work.leaves(START), {k: v.detach() for k, v in model.body.state_dict().items()})
    rows = []
    for number, style in enumerate(STYLES):
        images, labels = cut.old_test.style(number)
        rows.append(work.row(f"pretraining accuracy, {style}", accuracy(model, images, labels)))
    return [*rows, work.row("pretraining accuracy", sum(r["value"] for r in rows) / len(rows))]


def _pair_loss(model: ViT, emoji: Emoji, at: Tensor, draw: torch.Generator) -> Tensor:
    """Draw two styles of each emoji; name the subgroup, and find the other drawing."""
    count = len(at)
    styles = torch.rand((count, len(STYLES)), generator=draw).argsort(1)[:, :2]
    images = emoji.images[at[:, None], styles].flatten(0, 1)
    hidden = model.features(augmented(floats(images), draw))
    naming = functional.cross_entropy(
        model.head(hidden), emoji.labels[at].repeat_interleave(2), label_smoothing=0.1
    )
    unit = functional.normalize(hidden, dim=1)
    alike = unit @ unit.T / _TEMPERATURE
    alike.fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * count) ^ 1
    return naming + functional.cross_entropy(alike, partner)


def pretrained(work: Work, classes: int) -> ViT:
    """Return the pretrained body with a fresh classifier, the same for all conditions of a seed.

    Args:
        work: of the study.
        classes: of the classifier.

    Returns:
        The model.
    """
    model = ViT(work.settings, classes, work.generator("head"))
    start: Any = load(Path(work.folder) / START)
    model.body.load_state_dict(start)
    return model


def features(model: ViT, images: Tensor) -> Tensor:
    """Return features of many images, without a graph.

    Args:
        model: the model.
        images: uint8.

    Returns:
        ``[N, width]``.
    """
    with torch.no_grad():
        return torch.cat([model.features(floats(part)) for part in images.split(256)])


def accuracy(model: ViT, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model names rightly.

    Args:
        model: the model.
        images: uint8.
        labels: as many.

    Returns:
        A fraction.
    """
    with torch.no_grad():
        found = model.head(features(model, images)).argmax(1)
    return float((found == labels).double().mean())
