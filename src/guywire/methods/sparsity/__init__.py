"""Which parameters move at all: halves, smallest weights, learnt masks."""

from __future__ import annotations

from guywire.methods.sparsity.adaptation import SaRAAdaptation, sara_adapt, sara_adaptation
from guywire.methods.sparsity.half_fine_tuning import HalfFineTuning
from guywire.methods.sparsity.halves import half, half_fractions, half_reset
from guywire.methods.sparsity.sara import SaRA, sara_fold
from guywire.methods.sparsity.smallest import (
    nuclear_norm,
    sara_learning_rate,
    smallest_masks,
    threshold_of_share,
    vlhi,
)

__all__ = [
    "HalfFineTuning",
    "SaRA",
    "SaRAAdaptation",
    "half",
    "half_fractions",
    "half_reset",
    "nuclear_norm",
    "sara_adapt",
    "sara_adaptation",
    "sara_fold",
    "sara_learning_rate",
    "smallest_masks",
    "threshold_of_share",
    "vlhi",
]
