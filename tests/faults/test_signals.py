"""Signals that end the work: once, with the exit code of the shell, and never against `nohup`."""

from __future__ import annotations

import os
import signal

import pytest

from guywire.cli import app

if not hasattr(signal, "SIGHUP"):
    pytest.skip("needs POSIX signals", allow_module_level=True)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_disturb_the_clearing_up(
    which: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.signal(which, signal.SIG_DFL)  # under nohup the tests themselves ignore SIGHUP
    try:
        with app._ended_by_signals() as interrupted:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(which)
            signal.raise_signal(which)
            assert interrupted(["merge", "a", "b"]) == 128 + which
        assert "go on with the same command and --resume" in capsys.readouterr().err
        assert signal.getsignal(which) is signal.SIG_DFL
    finally:
        signal.signal(which, before)


def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with app._ended_by_signals() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupted([]) == 130  # as for Ctrl-C: no other signal came
    finally:
        signal.signal(signal.SIGHUP, before)
