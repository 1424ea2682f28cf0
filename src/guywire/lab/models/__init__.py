"""Small models, pretrained encoders, and the head that grows."""

from __future__ import annotations

from guywire.lab.models.build import build, prepare
from guywire.lab.models.classifier import Classifier, GrowingHead

__all__ = ["Classifier", "GrowingHead", "build", "prepare"]
