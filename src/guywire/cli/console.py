"""What commands share: two consoles, the one JSON document, numbers with intervals."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Mapping
from typing import Any

from rich.console import Console

__all__ = ["fail", "is_main_thread", "log", "number", "out", "print_json"]

# Where nobody looks on (a pipe, a file), lines need not fit a screen of 80 columns.
_WIDE = 160


def out() -> Console:
    """Return the console of standard output, for what was asked for.

    Returns:
        The console.
    """
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def log() -> Console:
    """Return the console of standard error, for progress and remarks.

    Returns:
        The console.
    """
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDE, highlight=False)


def print_json(value: Any) -> None:
    """Print the one JSON document of a command.

    Args:
        value: plain values; NaN and infinity become ``null``.
    """
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def fail(error: object, code: int) -> int:
    """Say in one sentence what went wrong.

    Args:
        error: what.
        code: the exit code.

    Returns:
        The exit code.
    """
    sys.stderr.write(f"guywire: {error}\n")
    return code


def is_main_thread() -> bool:
    """Tell whether signals can be handled here.

    Returns:
        True in the main thread.
    """
    return threading.current_thread() is threading.main_thread()


def number(interval: Mapping[str, float | None], scale: float = 1.0, digits: int = 1) -> str:
    """Write a mean with its interval.

    Args:
        interval: ``mean``, ``low``, ``high``.
        scale: by which to multiply: 100 for per cent.
        digits: after the point.

    Returns:
        ``"97.1 [96.4, 97.8]"``, ``"97.1"`` without an interval, a dash without a number.

    Example:
        >>> number({"mean": 0.5, "low": 0.4, "high": 0.6}, 100)
        '50.0 [40.0, 60.0]'
    """
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if mean is None:
        return "–"
    text = f"{_zero(mean * scale, digits):.{digits}f}"
    if low is None or high is None:
        return text
    ends = (f"{_zero(v * scale, digits):.{digits}f}" for v in (low, high))
    return f"{text} [{', '.join(ends)}]"


def _zero(value: float, digits: int) -> float:
    return 0.0 if abs(value) < 0.5 * 10**-digits else value  # never "-0.0"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
