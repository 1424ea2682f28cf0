"""Map a function over pieces on a few threads, in order, without running far ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Threads:
    """A pool whose threads use one core each.

    Args:
        count: how many; at most one a core.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = max(1, min(count or cores(), cores()))
        self._before = torch.get_num_threads()
        # Else each of our threads would bring as many of torch's along.
        self._pool = ThreadPoolExecutor(
            self.count, "guywire-merge", initializer=torch.set_num_threads, initargs=(1,)
        )

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    def map(self, function: Callable[[A], B], values: Iterable[A]) -> Iterator[B]:
        """Apply a function to values, in order; at most a few results wait to be taken.

        Args:
            function: of one value.
            values: any.

        Yields:
            The results, in order.
        """
        waiting: deque[Future[Any]] = deque()
        for value in values:
            waiting.append(self._pool.submit(function, value))
            if len(waiting) > 3 * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
