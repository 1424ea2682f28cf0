"""A small CLIP of transformers' own kind, and its pretraining on captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core.errors import need
from guywire.lab.models.seeding import seeded
from guywire.lab.studies.mask_tuning.pictures import Pictures, Words, augmented, shown

__all__ = ["build", "contrast", "pretrain", "prompt"]


def build(settings: Mapping[str, Any], vocabulary: int, generator: torch.Generator) -> nn.Module:
    """Return a CLIP model with random weights.

    Args:
        settings: of the study.
        vocabulary: how many words.
        generator: of the weights.

    Returns:
        transformers' ``CLIPModel``.
    """
    transformers = need("transformers", extra="hf")
    width = settings["width"]
    shared = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": settings["heads"],
    }
    text = shared | {
        "vocab_size": vocabulary,
        "num_hidden_layers": settings["text_layers"],
        "max_position_embeddings": settings["text_length"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,  # 2 would mean the old convention: the largest number ends a text
    }
    vision = shared | {
        "image_size": settings["side"],
        "patch_size": settings["patch"],
        "num_hidden_layers": settings["layers"],
    }
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=settings["features"]
    )
    with seeded(generator):
        return transformers.CLIPModel(config)


def prompt(group: str) -> str:
    """Return the text of a class.

    Args:
        group: name of a subgroup, such as ``face-concerned``.

    Returns:
        For instance ``a drawing of face concerned``.
    """
    return "a drawing of " + group.replace("-", " ")


def contrast(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Return CLIP's symmetric loss, where rows with the same text are all right answers.

    Args:
        images: ``[B, width]``, of length 1.
        texts: the same shape.
        scale: factor of the scores (0-d).
        same: ``[B, B]``, boolean: whether two rows have the same text.

    Returns:
        A 0-d tensor.
    """
    logits = scale * images @ texts.T
    targets = same.to(logits.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def pretrain(
    model: Any,
    pictures: Pictures,
    rows: Tensor,
    words: Words,
    settings: Mapping[str, Any],
    generator: torch.Generator,
) -> list[float]:
    """Train both towers on drawings and their texts, in place.

    A text is an emoji's caption, the prompt of its subgroup, or both, drawn anew each time.

    Args:
        model: transformers' ``CLIPModel``.
        pictures: all of them.
        rows: which to train on.
        words: the tokenizer.
        settings: of the study.
        generator: of order, texts and augmentation.

    Returns:
        The mean loss of each epoch.
    """
    captions = [pictures.captions[e] for e in pictures.emoji[rows].tolist()]
    prompts = [prompt(pictures.groups[g]) for g in pictures.group[rows].tolist()]
    both = [f"{p} {c}" for p, c in zip(prompts, captions, strict=True)]
    kinds = torch.stack([words(texts)["input_ids"] for texts in (captions, prompts, both)])
    size, epochs = settings["pretraining_batch"], settings["pretraining_epochs"]
    steps = len(rows) // size  # the last, short batch is left out: its loss is another one
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["pretraining_rate"], weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings["pretraining_rate"], total_steps=max(2, steps * epochs), pct_start=0.1
    )
    model.train()
    losses = []
    for _ in range(epochs):
        total = 0.0
        order = torch.randperm(len(rows), generator=generator)[: steps * size]
        for picked in order.split(size):
            kind = torch.randint(3, (len(picked),), generator=generator)
            ids = kinds[kind, picked]
            x = shown(augmented(pictures.images[rows[picked]], generator))
            outputs = model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=x)
            same = (ids[:, None] == ids[None]).all(-1)
            loss = contrast(
                outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp(), same
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=4.6)
            total += float(loss.detach())
        losses.append(total / steps)
    return losses
