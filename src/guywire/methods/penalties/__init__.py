"""Penalties on parameters, with an analytic gradient each."""

from guywire.methods.penalties.ewc import EWC, ewc_penalty
from guywire.methods.penalties.l1 import L1, l1_penalty
from guywire.methods.penalties.l2 import L2, l2_penalty

__all__ = ["EWC", "L1", "L2", "ewc_penalty", "l1_penalty", "l2_penalty"]
