"""Guywire: hold the parameters of neural networks near where they belong."""

from guywire import curvature, diagnostics
from guywire.core import schedules
from guywire.core.attach import Wires, attach
from guywire.core.errors import GuywireError
from guywire.core.losses import masked_cross_entropy, sigmoid_cross_entropy
from guywire.core.regularizer import Regularizer
from guywire.core.selection import select
from guywire.methods.adapters import (
    PEGO,
    AlignGuardLoRA,
    ILoRA,
    add_branch,
    critical_subspace,
    diversify_loss,
    fisher_norm,
    geodesic_overlap,
    hidden_state_loss,
    interpolate_adapters,
    lora_group,
    merge_lora_group,
    preserve_loss,
    riemannian_overlap,
    split_update,
)
from guywire.methods.distillation import (
    FeatureDistillation,
    PredictionDistillation,
    feature_distillation_loss,
    prediction_distillation_loss,
)
from guywire.methods.merging import AdamR, drop_and_rescale
from guywire.methods.penalties import EWC, L1, L2, ewc_penalty, l1_penalty, l2_penalty
from guywire.methods.rehearsal import GEM, Replay, gem_project
from guywire.methods.sparsity import (
    HalfFineTuning,
    SaRA,
    SaRAAdaptation,
    half,
    half_fractions,
    half_reset,
    nuclear_norm,
    sara_adapt,
    sara_adaptation,
    sara_fold,
    sara_learning_rate,
    smallest_masks,
    threshold_of_share,
    vlhi,
)

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "GEM",
    "L1",
    "L2",
    "PEGO",
    "AdamR",
    "AlignGuardLoRA",
    "FeatureDistillation",
    "GuywireError",
    "HalfFineTuning",
    "ILoRA",
    "PredictionDistillation",
    "Regularizer",
    "Replay",
    "SaRA",
    "SaRAAdaptation",
    "Wires",
    "add_branch",
    "attach",
    "critical_subspace",
    "curvature",
    "diagnostics",
    "diversify_loss",
    "drop_and_rescale",
    "ewc_penalty",
    "feature_distillation_loss",
    "fisher_norm",
    "gem_project",
    "geodesic_overlap",
    "half",
    "half_fractions",
    "half_reset",
    "hidden_state_loss",
    "interpolate_adapters",
    "l1_penalty",
    "l2_penalty",
    "lora_group",
    "masked_cross_entropy",
    "merge_lora_group",
    "nuclear_norm",
    "prediction_distillation_loss",
    "preserve_loss",
    "riemannian_overlap",
    "sara_adapt",
    "sara_adaptation",
    "sara_fold",
    "sara_learning_rate",
    "schedules",
    "select",
    "sigmoid_cross_entropy",
    "smallest_masks",
    "split_update",
    "threshold_of_share",
    "vlhi",
]
