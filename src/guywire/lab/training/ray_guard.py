"""What surrounds ``ray.init``: signals, limits of time, stillbirths, loopback, Ray's own remarks."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["as_written", "limited", "persistent", "quiet", "signals_kept"]

_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Keep our own reaction to SIGTERM: ``ray.init`` sets another."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """End a block that takes too long: ``ray.init`` waits for a Ray Client server without end.

    There is no limit off the main thread, nor on a platform without timers, nor when somebody
    else's timer runs.

    Args:
        seconds: at most.

    Raises:
        TimeoutError: the time is over.

    Example:
        >>> with limited(60):
        ...     pass
    """
    # Another thread would do on every platform, but Ray Client keeps its connection a thread.
    if (
        threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, "setitimer")
        or signal.getitimer(signal.ITIMER_REAL)[0] > 0
    ):
        yield
        return

    def over(number: int, frame: Any) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # anew, should a retry catch it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)


def persistent(begin: Callable[[], None], *, sessions: int = 4) -> None:
    """Begin a session of Ray Client, again where the server that should serve it died at birth.

    The head node forks a server for each session while its gRPC threads run, and some die of that
    before they have begun: https://github.com/ray-project/ray/issues/63202.

    Args:
        begin: begins a session, or raises what Ray raises; leaves nothing behind then.
        sessions: to try at most.
    """
    for _ in range(sessions - 1):
        try:
            return begin()
        except Exception as error:  # of a dozen kinds
            if "Starting Ray client server failed" not in str(error):
                raise
    return begin()


@contextlib.contextmanager
def as_written(inherited: bool = False) -> Iterator[None]:
    """Let Ray take 127.0.0.1 for what it is.

    Ray takes it for the machine's outward address, except where it does not expect clusters. What
    says that it does not is a variable that it reads when it is imported.

    Args:
        inherited: for the processes that this one starts, too.
    """
    constants: Any = None
    with contextlib.suppress(ImportError):  # not every version has it
        constants = importlib.import_module("ray._private.ray_constants")
    had = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    was = os.environ.get(_SWITCH)
    if had is not None:
        constants.ENABLE_RAY_CLUSTER = False
    if inherited:
        os.environ[_SWITCH] = "0"
    try:
        yield
    finally:
        if had is not None:
            constants.ENABLE_RAY_CLUSTER = had
        if inherited:
            os.environ.pop(_SWITCH)
            if was is not None:
                os.environ[_SWITCH] = was


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let Ray's own remarks not tear the progress bar: what matters we say ourselves."""
    log = logging.getLogger("ray")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
