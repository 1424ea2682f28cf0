from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from guywire.core.errors import UsageError
from guywire.lab.training import locks

pytest.importorskip("fcntl")


def test_a_lock_is_taken_seen_and_let_go(tmp_path: Path) -> None:
    assert not locks.is_locked(tmp_path)
    with (tmp_path / locks.FILE).open("w") as file:
        assert not locks.is_locked(tmp_path)
        locks.take(file, tmp_path)
        assert locks.is_locked(tmp_path)
        with (
            (tmp_path / locks.FILE).open("w") as other,
            pytest.raises(UsageError, match="another process is at work"),
        ):
            locks.take(other, tmp_path)
    assert not locks.is_locked(tmp_path)


def test_a_look_at_the_lock_does_not_keep_a_run_out(tmp_path: Path) -> None:
    import fcntl

    looking = (tmp_path / locks.FILE).open("w")
    fcntl.flock(looking, fcntl.LOCK_SH)
    timer = threading.Timer(0.1, looking.close)
    timer.start()
    try:
        with (tmp_path / locks.FILE).open("r") as file:
            locks.take(file, tmp_path)
            assert locks.is_locked(tmp_path)
    finally:
        timer.join()


def test_a_killed_process_has_no_lock(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from guywire.lab.training import locks\n"
        "path = Path(sys.argv[1])\n"
        "file = (path / locks.FILE).open('w')\n"
        "locks.take(file, path)\n"
        "print('taken', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        assert locks.is_locked(tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert not locks.is_locked(tmp_path)
