"""Edits of fine-tuned weights after training: prune and rescale their difference to the base."""

from __future__ import annotations

__all__: list[str] = []
