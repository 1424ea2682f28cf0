"""What surrounds ``ray.init``, without Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import pytest

from guywire.lab.training.ray_guard import as_written, limited, persistent, signals_kept


def test_what_takes_too_long_is_ended() -> None:
    before = signal.getsignal(signal.SIGALRM)
    # A timer that runs (pytest-timeout has one) is left alone.
    outer = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"), limited(0.05):
            time.sleep(10)
        with limited(60):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) is before
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)


STILLBORN = ConnectionAbortedError(
    "Initialization failure from server:\nTraceback (most recent call last):\n"
    "RuntimeError: Starting Ray client server failed. See ray_client_server_23001.err"
)


@pytest.mark.parametrize(
    ("errors", "tries", "raised"),
    [
        ([], 1, None),
        ([STILLBORN] * 3, 4, None),
        ([STILLBORN] * 9, 4, ConnectionAbortedError),
        ([STILLBORN, TimeoutError()], 2, TimeoutError),
        ([ConnectionError("Starting is not allowed")], 1, ConnectionError),
    ],
)
def test_only_a_server_that_died_at_birth_is_tried_again(
    errors: list[Exception], tries: int, raised: type[Exception] | None
) -> None:
    to_come, made = iter(errors), []

    def begin() -> None:
        made.append(1)
        if (error := next(to_come, None)) is not None:
            raise error

    with pytest.raises(raised) if raised else contextlib.nullcontext():
        persistent(begin)
    assert len(made) == tries


def test_no_limit_off_the_main_thread() -> None:
    done = threading.Event()

    def work() -> None:
        with limited(0.01), signals_kept():
            time.sleep(0.05)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done.is_set()


@pytest.mark.parametrize("was", [None, "1"])
def test_the_variable_is_put_back(was: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    if was is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, was)
    with as_written(inherited=True):
        assert os.environ[name] == "0"
    assert os.environ.get(name) == was
