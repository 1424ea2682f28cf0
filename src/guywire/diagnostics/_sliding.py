"""The largest fall below the maximum of a sliding window."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from guywire.core.errors import UsageError


class Slide:
    """Values in, the largest ``max of the window - newest value`` out, by a monotone deque.

    That maximum over all windows is the largest drop inside any window, so nothing else is needed.

    Args:
        window: values in a window, at least 2; ``None`` for all.
    """

    def __init__(self, window: int | None) -> None:
        if window is not None and window < 2:
            raise UsageError(f"a window of {window} evaluations sees no drop: use at least 2")
        self.window = window
        self.worst = 0.0
        self.count = 0
        self.queue: deque[tuple[int, float]] = deque()

    def push(self, value: float) -> None:
        """Take in a value, in O(1) amortised.

        Args:
            value: the newest.
        """
        while self.queue and self.queue[-1][1] <= value:
            self.queue.pop()
        self.queue.append((self.count, value))
        if self.window is not None and self.queue[0][0] <= self.count - self.window:
            self.queue.popleft()
        self.count += 1
        self.worst = max(self.worst, self.queue[0][1] - value)

    def state(self) -> dict[str, Any]:
        """Return everything needed to go on.

        Returns:
            A tree.
        """
        return {
            "worst": self.worst,
            "count": self.count,
            "index": torch.tensor([i for i, _ in self.queue], dtype=torch.int64),
            "value": torch.tensor([v for _, v in self.queue], dtype=torch.float64),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` gave.

        Args:
            state: the tree.
        """
        self.worst, self.count = float(state["worst"]), int(state["count"])
        pairs = zip(state["index"].tolist(), state["value"].tolist(), strict=True)
        self.queue = deque(pairs)
