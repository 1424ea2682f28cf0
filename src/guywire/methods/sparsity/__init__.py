"""Which parameters move at all: halves, smallest weights, learnt masks."""

from __future__ import annotations

from guywire.methods.sparsity.adaptation import (
    SaRAAdaptation,
    sara_adapt,
    sara_adaptation,
    sara_fold,
)
from guywire.methods.sparsity.half_fine_tuning import HalfFineTuning
from guywire.methods.sparsity.halves import half, half_fractions, half_reset
from guywire.methods.sparsity.mask_files import (
    MaskReport,
    apply_mask,
    load_mask,
    mask_report,
    save_mask,
)
from guywire.methods.sparsity.mask_flips import FlipBudget, flip_budget
from guywire.methods.sparsity.mask_tuning import (
    MaskTuning,
    gradient_dropout,
    keep_probability,
    prediction_drift,
)
from guywire.methods.sparsity.masks import fold_mask, mask, unmask
from guywire.methods.sparsity.sara import SaRA
from guywire.methods.sparsity.smallest import (
    nuclear_norm,
    sara_learning_rate,
    smallest_masks,
    threshold_of_share,
    vlhi,
)
from guywire.methods.sparsity.zero_shot import ZeroShotClassifier, text_features

__all__ = [
    "FlipBudget",
    "HalfFineTuning",
    "MaskReport",
    "MaskTuning",
    "SaRA",
    "SaRAAdaptation",
    "ZeroShotClassifier",
    "apply_mask",
    "flip_budget",
    "fold_mask",
    "gradient_dropout",
    "half",
    "half_fractions",
    "half_reset",
    "keep_probability",
    "load_mask",
    "mask",
    "mask_report",
    "nuclear_norm",
    "prediction_drift",
    "sara_adapt",
    "sara_adaptation",
    "sara_fold",
    "sara_learning_rate",
    "save_mask",
    "smallest_masks",
    "text_features",
    "threshold_of_share",
    "unmask",
    "vlhi",
]
