"""Diagnostics: what a stream of tasks does to a model, seen while it happens."""

from guywire.diagnostics.connectivity import connectivity
from guywire.diagnostics.curves import Connectivity
from guywire.diagnostics.forgetting import (
    average_accuracy,
    backward_transfer,
    forgetting,
    global_forgetting,
    learning_accuracy,
    local_forgetting,
)
from guywire.diagnostics.gradients import GradientSplit, gradient_split
from guywire.diagnostics.monitor import ContinualMonitor, Observation
from guywire.diagnostics.stability import (
    end_forgetting,
    final_accuracy,
    learning_curve_area,
    min_acc,
    wc_acc,
    windowed_forgetting,
    windowed_plasticity,
)
from guywire.diagnostics.tracker import StabilityTracker

__all__ = [
    "Connectivity",
    "ContinualMonitor",
    "GradientSplit",
    "Observation",
    "StabilityTracker",
    "average_accuracy",
    "backward_transfer",
    "connectivity",
    "end_forgetting",
    "final_accuracy",
    "forgetting",
    "global_forgetting",
    "gradient_split",
    "learning_accuracy",
    "learning_curve_area",
    "local_forgetting",
    "min_acc",
    "wc_acc",
    "windowed_forgetting",
    "windowed_plasticity",
]
