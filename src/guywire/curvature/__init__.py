"""Curvature from exact per-sample gradients: the Fisher information's diagonal, and that of outputs."""

from guywire.curvature.fisher import diagonal_fisher
from guywire.curvature.output_gram import output_gram

__all__ = ["diagonal_fisher", "output_gram"]
