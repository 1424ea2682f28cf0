"""Low-rank adapters and factors: what they may touch, and how they are kept apart or averaged."""

from __future__ import annotations

from guywire.methods.adapters._hidden import hidden_state_loss
from guywire.methods.adapters.alignguard import AlignGuardLoRA
from guywire.methods.adapters.alignguard_terms import (
    critical_subspace,
    fisher_norm,
    geodesic_overlap,
    riemannian_overlap,
    split_update,
)
from guywire.methods.adapters.averaging import interpolate_adapters
from guywire.methods.adapters.branches import add_branch
from guywire.methods.adapters.groups import lora_group, merge_lora_group
from guywire.methods.adapters.i_lora import ILoRA
from guywire.methods.adapters.low_rank import factorize, fold_factors
from guywire.methods.adapters.pego import PEGO, diversify_loss, preserve_loss
from guywire.methods.adapters.pela import PELA, block_distillation_loss, perturbation_loss

__all__ = [
    "PEGO",
    "PELA",
    "AlignGuardLoRA",
    "ILoRA",
    "add_branch",
    "block_distillation_loss",
    "critical_subspace",
    "diversify_loss",
    "factorize",
    "fisher_norm",
    "fold_factors",
    "geodesic_overlap",
    "hidden_state_loss",
    "interpolate_adapters",
    "lora_group",
    "merge_lora_group",
    "perturbation_loss",
    "preserve_loss",
    "riemannian_overlap",
    "split_update",
]
