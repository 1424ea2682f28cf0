"""Sweeps over strengths: which values a comparison runs with, chosen on validation data only."""

from __future__ import annotations
