"""One loop, one trial, resume; the grid of trials; means and intervals over seeds."""

from __future__ import annotations

from guywire.lab.training.compare import Comparison, compare, resolve
from guywire.lab.training.config import CompareConfig, EvaluationConfig, TrialSpec
from guywire.lab.training.grid import Outcome, run_grid
from guywire.lab.training.results import METRICS, aggregate, interval
from guywire.lab.training.trial import run_trial

__all__ = [
    "METRICS",
    "CompareConfig",
    "Comparison",
    "EvaluationConfig",
    "Outcome",
    "TrialSpec",
    "aggregate",
    "compare",
    "interval",
    "resolve",
    "run_grid",
    "run_trial",
]
