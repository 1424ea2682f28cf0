"""Worker processes that several studies share, so that none is idle while another has work."""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

__all__ = ["Crew"]


class Crew:
    """Spawned processes and the calls that wait for them; a context manager.

    A study goes on when the last call of its stage has ended, so a free process takes a call of the
    study that is nearest to that: of those that wait, the one with the fewest calls to go.

    Args:
        workers: how many processes, which start with the first call.
        prepare: run once in each process.
    """

    def __init__(self, workers: int, prepare: Callable[[], None] | None = None) -> None:
        self.workers = workers
        self._executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=prepare
        )
        self._lock = threading.Lock()
        self._waiting: dict[object, deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]]
        self._waiting = {}
        self._running: dict[object, int] = {}
        self._stopped = False

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stop(kill=kind is not None)

    def submit(
        self, owner: object, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]
    ) -> list[Future[Any]]:
        """Queue calls.

        Args:
            owner: whose they are; any hashable object.
            function: importable by its name in another process.
            calls: arguments of each call, in the order in which they are to start.

        Returns:
            One future a call, cancelled if the crew stops or the owner drops it first.
        """
        futures: list[Future[Any]] = [Future() for _ in calls]
        with self._lock:
            if self._stopped:
                for future in futures:
                    future.cancel()
                return futures
            queue = self._waiting.setdefault(owner, deque())
            queue.extend(zip(futures, [function] * len(calls), calls, strict=True))
        self._dispatch()
        return futures

    def drop(self, owner: object) -> None:
        """Forget an owner's calls that have not started.

        Args:
            owner: as given to :meth:`submit`.
        """
        with self._lock:
            dropped = self._waiting.pop(owner, deque())
        for future, *_ in dropped:
            future.cancel()

    def stop(self, *, kill: bool) -> None:
        """End the processes.

        Args:
            kill: at once; else when what has started is done.
        """
        with self._lock:
            self._stopped = True
            owners = list(self._waiting)
        for owner in owners:
            self.drop(owner)
        if kill:
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _dispatch(self) -> None:
        """Give calls to free processes; one call a process, so that the order stays ours."""
        while True:
            with self._lock:
                if self._stopped or sum(self._running.values()) >= self.workers:
                    return
                owners = [owner for owner, queue in self._waiting.items() if queue]
                if not owners:
                    return
                owner = min(owners, key=self._left)  # of equals, who came first
                outer, function, arguments = self._waiting[owner].popleft()
                self._running[owner] = self._running.get(owner, 0) + 1
            try:
                inner = self._executor.submit(function, *arguments)
            except RuntimeError as error:  # broken, or shut down meanwhile
                self._ended(owner, outer, error=error)
                continue
            inner.add_done_callback(lambda done, o=owner, f=outer: self._collect(o, f, done))

    def _left(self, owner: object) -> int:
        return len(self._waiting[owner]) + self._running.get(owner, 0)

    def _collect(self, owner: object, outer: Future[Any], inner: Future[Any]) -> None:
        error = None if inner.cancelled() else inner.exception()
        if inner.cancelled() or isinstance(error, BrokenProcessPool):
            # This may run while the executor holds its own lock: it must not be asked for anything.
            error = error or BrokenProcessPool("the workers were stopped")
            self._ended(owner, outer, error=error)
            self._break(error)
            return
        if error is not None:
            self._ended(owner, outer, error=error)
        else:
            self._ended(owner, outer, result=inner.result())
        self._dispatch()

    def _break(self, error: BaseException) -> None:
        with self._lock:
            self._stopped = True
            lost = [call for queue in self._waiting.values() for call in queue]
            self._waiting.clear()
        for future, *_ in lost:
            future.set_exception(error)

    def _ended(
        self,
        owner: object,
        outer: Future[Any],
        *,
        result: Any = None,
        error: BaseException | None = None,
    ) -> None:
        with self._lock:
            self._running[owner] -= 1
        if error is not None:
            outer.set_exception(error)
        else:
            outer.set_result(result)
