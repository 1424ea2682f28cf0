"""One process at a time in a run's folder: a lock that is gone with its process, however it ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO

from guywire.core.errors import UsageError

__all__ = ["FILE", "is_locked", "take"]

FILE = ".lock"
"""In a folder: what is locked."""


def take(file: IO[str], path: Path) -> None:
    """Lock a folder, or say that somebody has it.

    Args:
        file: the folder's ``FILE``, open for writing; the lock lasts until it is closed.
        path: the folder.

    Raises:
        UsageError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        return
    for wait in (0.05, 0.1, 0.2, None):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if wait is None:
                raise UsageError(
                    f"another process is at work in {path}: wait for it, or choose another folder"
                ) from error
            time.sleep(wait)  # `guywire runs` looks at locks for a moment


def is_locked(path: Path) -> bool:
    """Tell whether a process is at work in a folder.

    Args:
        path: the folder.

    Returns:
        True if one is, and where that cannot be told.
    """
    try:
        import fcntl

        with (path / FILE).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except ImportError:
        return True  # cannot tell
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
