"""Low-rank adapters and factors: what they may touch, and how they are kept apart or averaged."""

from __future__ import annotations

__all__: list[str] = []
