"""Which parameters move at all: halves, smallest weights, learnt masks."""

from __future__ import annotations

from guywire.methods.sparsity.half_fine_tuning import HalfFineTuning
from guywire.methods.sparsity.halves import half, half_fractions, half_reset

__all__ = [
    "HalfFineTuning",
    "half",
    "half_fractions",
    "half_reset",
]
