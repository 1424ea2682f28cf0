"""What a measured process hears and says: a line of JSON each way.

The driver starts a side with its parameters as the first argument. The side prepares, says
``{"ready": true, "about": {...}}``, and then answers ``{"run": NAME}`` with ``{"seconds": S}`` (and
what else the thing returned) or ``{"error": WHY}``, until its input ends. So imports, data and first
passes are never timed, and the driver can let two processes take turns.

Standard library only: peers run it in environments of their own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

Thing = Callable[[], Any]
"""Called once a repetition. A dict that it returns joins the answer; its "seconds" replace ours."""


def serve(prepare: Callable[[dict[str, Any]], tuple[Mapping[str, Thing], dict[str, Any]]]) -> None:
    """Prepare, then answer until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is not the protocol

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        things, about = prepare(json.loads(sys.argv[1]))
    except Exception as error:
        say({"error": reason(error)})
        return
    say({"ready": True, "about": about, "things": sorted(things)})
    for line in sys.stdin:
        name = json.loads(line)["run"]
        try:
            say(timed(things[name]))
        except Exception as error:
            say({"error": reason(error)})


def timed(thing: Thing) -> dict[str, Any]:
    """Run once, without the garbage collector in between."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        found = thing()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    return {"seconds": seconds} | (found if isinstance(found, dict) else {})


def reason(error: BaseException) -> str:
    """One line about an error, without paths."""
    first = (str(error).splitlines() or [""])[0]
    words = [w if "/" not in w else os.path.basename(w.rstrip("/'\",.:")) for w in first.split()]
    return f"{type(error).__name__}: {' '.join(words)}"[:300]


def versions(*packages: str) -> dict[str, str]:
    """Versions of what is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
