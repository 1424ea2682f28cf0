"""Distillation: hold what the model computes to what a frozen copy of it computes."""

from guywire.methods.distillation.feature import FeatureDistillation, feature_distillation_loss
from guywire.methods.distillation.prediction import (
    PredictionDistillation,
    prediction_distillation_loss,
)

__all__ = [
    "FeatureDistillation",
    "PredictionDistillation",
    "feature_distillation_loss",
    "prediction_distillation_loss",
]
