"""CLIP as a classifier: scores of images against texts that are encoded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guywire.core.aside import undisturbed
from guywire.core.errors import UsageError
from guywire.core.selection import unwrap

__all__ = ["ZeroShotClassifier", "text_features"]


def text_features(model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    """Encode texts with the text tower of a CLIP model.

    Args:
        model: transformers' ``CLIPModel``.
        tokens: what its tokenizer gave: ``input_ids`` and, where texts are padded,
            ``attention_mask``, each ``[texts, length]``.

    Returns:
        ``[texts, width]``, of length 1 each, without a graph.

    Raises:
        UsageError: the model has no two towers.
    """
    clip: Any = _two_towers(model)
    with torch.no_grad(), undisturbed(clip, mode=False):
        pooled = clip.text_model(**dict(tokens)).pooler_output
        return F.normalize(clip.text_projection(pooled), dim=-1)


class ZeroShotClassifier(nn.Module):
    """The image tower of a CLIP model with fixed texts as its head.

    ``logits = exp(logit_scale) * <image, text>`` of features of length 1. The tower is shared with
    the CLIP model, not copied: what is tuned or masked here is so there.

    Args:
        model: transformers' ``CLIPModel``.
        texts: ``[classes, width]``, as :func:`text_features` gives them.

    Raises:
        UsageError: the model has no two towers, or the texts do not fit it.
    """

    def __init__(self, model: nn.Module, texts: Tensor) -> None:
        super().__init__()
        clip: Any = _two_towers(model)
        width = clip.visual_projection.out_features
        if texts.dim() != 2 or texts.shape[1] != width:
            raise UsageError(
                f"texts of shape {tuple(texts.shape)} do not fit a model whose features are "
                f"{width} wide: make them with text_features(model, tokens)"
            )
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.logit_scale = clip.logit_scale
        self.texts: Tensor
        self.register_buffer("texts", texts.detach().clone())

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the scores of the classes.

        Args:
            pixel_values: ``[batch, channels, height, width]``.
            labels: not used; the Hugging Face ``Trainer`` keeps the labels of models that take them.

        Returns:
            Logits ``[batch, classes]``.
        """
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        images = F.normalize(self.visual_projection(pooled), dim=-1)
        return self.logit_scale.exp() * images @ self.texts.to(images.dtype).T


def _two_towers(model: nn.Module) -> nn.Module:
    inner = unwrap(model)
    needed = ("text_model", "vision_model", "text_projection", "visual_projection", "logit_scale")
    missing = [name for name in needed if not hasattr(inner, name)]
    if missing:
        raise UsageError(
            f"a {type(inner).__name__} has no {missing[0]!r}: give transformers' CLIPModel"
        )
    return inner
