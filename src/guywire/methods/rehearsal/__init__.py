"""Rehearsal: keep a few old samples, and learn them again or be constrained by them."""

from guywire.core.buffers import BalancedBuffer, Buffer, ReservoirBuffer
from guywire.methods.rehearsal.gem import GEM, gem_project, gem_weights
from guywire.methods.rehearsal.replay import Replay

__all__ = [
    "GEM",
    "BalancedBuffer",
    "Buffer",
    "Replay",
    "ReservoirBuffer",
    "gem_project",
    "gem_weights",
]
