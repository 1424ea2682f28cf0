"""Run a function on several gloo processes: two on a CPU are enough to test what they exchange."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guywire.core import checkpoint
from guywire.core.errors import UsageError

__all__ = ["run_processes"]

_JOIN = """
import sys
from guywire.testing._worker import main
main(*sys.argv[1:])
"""


def run_processes(
    function: Callable[..., Any], count: int = 2, *, timeout: float = 120.0, **arguments: Any
) -> list[Any]:
    """Call ``function(rank, **arguments)`` in new processes joined by gloo; return what each gave.

    The processes are started afresh, with one thread each. The function is found by its file and
    name, and arguments and results travel as checkpoints, so nothing is pickled.

    Args:
        function: at the top level of a file; the file is run in each process.
        count: how many processes; with one, no process group is made.
        timeout: seconds until all are stopped.
        **arguments: trees as :func:`guywire.core.checkpoint.save` takes them.

    Returns:
        The results, by rank: trees as well.

    Raises:
        UsageError: the function is not at the top level of a file.
        RuntimeError: a process failed, or all took too long; the message ends with what the first
            of them said.
    """
    file, name = locate(function)
    with tempfile.TemporaryDirectory(prefix="guywire-") as folder:
        checkpoint.save(Path(folder) / "arguments.safetensors", arguments)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        workers = []
        for rank in range(count):
            log = (Path(folder) / f"log-{rank}.txt").open("w")
            command = [sys.executable, "-c", _JOIN, file, name, folder, str(rank), str(count)]
            with log:
                workers.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                )
        try:
            _wait(workers, timeout, Path(folder), name)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return [
            checkpoint.load(Path(folder) / f"result-{rank}.safetensors")["result"]
            for rank in range(count)
        ]


def locate(function: Callable[..., Any]) -> tuple[str, str]:
    """Return the file and the name under which another process finds a function or class.

    Args:
        function: at the top level of a file.

    Returns:
        Path and name.

    Raises:
        UsageError: it is not.
    """
    name = getattr(function, "__qualname__", "<nameless>")
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    if file is None or not os.path.exists(file) or "<" in name or "." in name:
        raise UsageError(
            f"{name!r} cannot be found by another process: define it with def or class at the top "
            "level of a file"
        )
    return file, name


def _wait(workers: list[subprocess.Popen[bytes]], timeout: float, folder: Path, name: str) -> None:
    end = time.monotonic() + timeout
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            said = (folder / f"log-{failed[0]}.txt").read_text()[-4000:]
            raise RuntimeError(f"process {failed[0]} of {name} failed:\n{said}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > end:
            said = (folder / "log-0.txt").read_text()[-4000:]
            raise RuntimeError(f"{name} took longer than {timeout} s; process 0 said:\n{said}")
        time.sleep(0.02)
