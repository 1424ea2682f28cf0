"""Which parameters move at all: halves, smallest weights, learnt masks."""

from __future__ import annotations

__all__: list[str] = []
