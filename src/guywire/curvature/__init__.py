"""Curvature: the exact per-sample diagonal of the Fisher information."""

from guywire.curvature.fisher import diagonal_fisher

__all__ = ["diagonal_fisher"]
