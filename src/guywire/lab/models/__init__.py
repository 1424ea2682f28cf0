"""Small models, pretrained encoders, and the head that grows."""

from __future__ import annotations

from guywire.lab.models.build import (
    IMAGE_MODELS,
    TEXT_MODELS,
    attention_glob,
    build,
    prepare,
)
from guywire.lab.models.classifier import Classifier, GrowingHead

__all__ = [
    "IMAGE_MODELS",
    "TEXT_MODELS",
    "Classifier",
    "GrowingHead",
    "attention_glob",
    "build",
    "prepare",
]
