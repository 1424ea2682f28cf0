"""The part of a trial on Ray that runs on a node, and the mailbox through which files come home.

A thread watches the trial's folder and ships every file that changed. It needs no hook in the
trial, training never waits for the network, and when the network is slower than the checkpoints
the newest one goes next. Files in that folder are replaced atomically, so it reads whole ones.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import guywire
from guywire.core import writing
from guywire.core.errors import GuywireError

__all__ = [
    "LOG",
    "STATE",
    "Mailbox",
    "Shipper",
    "environment",
    "line",
    "read_files",
    "run_here",
    "run_on_node",
    "step_of",
]

STATE, LOG = "state.safetensors", "log.txt"
_RESULT = "result.json"  # goes home with the answer only: where it lies, the trial is whole
_LOCK = ".alive"
_PREFIX = "guywire-trial-"
_PASSED = ("GUYWIRE_DATA", "HF_HUB_OFFLINE")  # where a node has none of its own


class Mailbox:
    """The newest content of every file, until it is fetched. An actor near the driver."""

    def __init__(self) -> None:
        self._mail: dict[tuple[str, int, str], bytes] = {}

    def put(self, trial: str, attempt: int, name: str, data: bytes) -> None:
        """Leave a file; it takes the place of an older one that nobody fetched.

        Args:
            trial: its id.
            attempt: the number of the attempt that wrote it.
            name: of the file.
            data: its content.
        """
        self._mail[trial, attempt, name] = data

    def take(self) -> list[tuple[str, int, str, bytes]]:
        """Fetch what came since the last time.

        Returns:
            Trial, attempt, name and content of each file.
        """
        mail, self._mail = self._mail, {}
        return [(*key, data) for key, data in mail.items()]


class Shipper(threading.Thread):
    """Send files of a folder when they change.

    Args:
        folder: to watch. Names with a leading dot, and ``result.json``, stay.
        send: takes a name and a content; when it raises, the file is sent again later.
        every: seconds between two looks.
    """

    def __init__(self, folder: Path, send: Callable[[str, bytes], None], every: float = 0.5):
        super().__init__(name="guywire-shipper", daemon=True)
        self.folder, self.send, self.every = folder, send, every
        self._sent: dict[str, tuple[int, int, int]] = {}
        self._ended = threading.Event()
        self._failures = 0

    def look(self) -> None:
        """Send what changed since the last look."""
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith(".") or path.name == _RESULT:
                continue
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                status = os.fstat(file.fileno())
                signature = (status.st_ino, status.st_mtime_ns, status.st_size)
                if self._sent.get(path.name) == signature:
                    continue
                data = file.read()
                try:
                    self.send(path.name, data)
                except Exception as error:  # a lost file costs time, never the trial
                    self._failures += 1
                    if self._failures == 1:
                        logging.getLogger("guywire.lab").warning(
                            "%s could not be sent home (%s): trying again", path.name, error
                        )
                    return
                self._failures = 0
                self._sent[path.name] = signature

    def run(self) -> None:
        """Look again and again."""
        while not self._ended.wait(min(30.0, self.every * 2**self._failures)):
            self.look()

    def __enter__(self) -> Shipper:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def run_on_node(job: str, files: Mapping[str, bytes], mailbox: Any) -> tuple[str, dict[str, bytes]]:
    """Run one trial in a folder of this node. The function of the Ray task.

    Args:
        job: JSON: ``spec``, ``attempt``, ``resume``, ``home`` (the trial's folder on the driver),
            ``cwd``, ``environment``, ``version``, ``scratch``.
        files: what lies in the trial's folder to begin with.
        mailbox: handle of the :class:`Mailbox` actor.

    Returns:
        JSON as :func:`guywire.lab.training.grid.attempt` returns, and the folder's files.
    """
    import ray

    task = json.loads(job)
    trial, attempt = task["trial"], task["attempt"]

    def send(name: str, data: bytes) -> None:
        # Off the main thread, waiting here does not make Ray think that our cores are idle.
        ray.get(mailbox.put.remote(trial, attempt, name, data), timeout=120)

    where = f"{ray.util.get_node_ip_address()} ({socket.gethostname()}, pid {os.getpid()})"
    with _scratch(task["scratch"]) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
        with _logged(folder / LOG), Shipper(folder, send):
            answer = run_here(task, folder, where)
        return json.dumps(answer), read_files(folder)


def run_here(task: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """Run a trial under the driver's conditions, and tell errors from the driver's point of view.

    Args:
        task: the job.
        folder: the trial's, on this node.
        where: this node, for sentences.

    Returns:
        ``{"result": ...}`` or ``{"error": ...}``.
    """
    from guywire.lab.training import grid
    from guywire.lab.training.config import TrialSpec

    _say(f"attempt {task['attempt']} on {where}, {_software()}")
    if task["version"] != guywire.__version__:
        return _refused(
            folder,
            f"{task['trial']}: the node {where} has guywire {guywire.__version__}, the driver has "
            f"{task['version']}: install the same version everywhere",
        )
    with _surroundings(task):
        spec = TrialSpec.model_validate(task["spec"])
        try:
            grid._stream(spec.stream.model_dump_json(), spec.model)  # the trial finds it in memory
        except (GuywireError, OSError) as error:
            return _refused(
                folder,
                f"{task['trial']}: the node {where} cannot load data or model: {error} (each "
                "node needs them under the same path, or a GUYWIRE_DATA of its own)",
            )
        if task["resume"] and (folder / STATE).is_file():
            step = step_of((folder / STATE).read_bytes())
            _say(f"going on from {'the state' if step is None else f'step {step}'}")
        answer = grid.attempt(spec, folder, task["resume"])
    written = folder / "error.json"
    if written.is_file():
        text = written.read_text(encoding="utf-8").replace(str(folder), task["home"])
        writing.write_text(written, text)
    if "error" in answer:
        why = answer["error"].replace(str(folder), task["home"])
        answer = {"error": f"{why} (on the node {where})"}
    _say(f"failed: {answer['error']}" if "error" in answer else "finished")
    return answer


def read_files(folder: Path) -> dict[str, bytes]:
    """Read a trial's files.

    Args:
        folder: the trial's.

    Returns:
        Name to content, without hidden ones.
    """
    if not folder.is_dir():
        return {}
    found = (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("."))
    return {path.name: path.read_bytes() for path in found}


def step_of(state: bytes) -> int | None:
    """Read from a state after how many steps it was saved, without its tensors.

    Args:
        state: the content of ``state.safetensors``; its first part will do.

    Returns:
        The number, ``None`` if the header does not tell.
    """
    try:
        length = int.from_bytes(state[:8], "little")
        tree = json.loads(json.loads(state[8 : 8 + length])["__metadata__"]["tree"])
        return int(dict(tree["dict"])["position"][3])
    except (KeyError, ValueError, TypeError, IndexError):
        return None


def _refused(folder: Path, why: str) -> dict[str, Any]:
    _say(f"failed: {why}")
    with contextlib.suppress(GuywireError):
        writing.write_json(
            folder / "error.json", {"error": why, "traceback": None, "kind": "DataError"}
        )
    return {"error": why}


def _software() -> str:
    import torch

    return f"Python {platform.python_version()}, torch {torch.__version__}"


def _say(line: str) -> None:
    logging.getLogger("guywire.lab").info(line)


@contextlib.contextmanager
def _surroundings(task: dict[str, Any]) -> Iterator[None]:
    """Be where the driver is: relative paths and the data folder mean the same here, if they can."""
    for name, value in task["environment"].items():
        os.environ.setdefault(name, value)
    before = Path.cwd()
    if Path(task["cwd"]).is_dir():
        os.chdir(task["cwd"])
    try:
        yield
    finally:
        os.chdir(before)


def environment() -> dict[str, str]:
    """Return what a node takes over from the driver where it has no setting of its own.

    Returns:
        Names to values; the data folder as an absolute path.
    """
    found = {name: os.environ[name] for name in _PASSED if name in os.environ}
    if "GUYWIRE_DATA" in found:
        found["GUYWIRE_DATA"] = str(Path(found["GUYWIRE_DATA"]).expanduser().absolute())
    return found


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Lead log lines, warnings and what is printed into a file."""
    root, ours = logging.getLogger(), logging.getLogger("guywire")
    level = ours.level
    with path.open("a", encoding="utf-8", buffering=1) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(_Lines())
        root.addHandler(handler)
        ours.setLevel(logging.INFO)
        logging.captureWarnings(True)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            logging.captureWarnings(False)
            ours.setLevel(level)
            root.removeHandler(handler)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return line(record.getMessage())


def line(text: str) -> str:
    """Put the time before a line of a trial's log.

    Args:
        text: the line.

    Returns:
        The time in UTC and the text.
    """
    return f"{datetime.now(UTC).isoformat(timespec='seconds')} {text.rstrip()}"


@contextlib.contextmanager
def _scratch(parent: str | None) -> Iterator[Path]:
    """Make a folder for a trial; sweep out those whose process was killed."""
    home = Path(parent or tempfile.gettempdir())
    with _lock_free():
        for old in home.glob(f"{_PREFIX}*"):
            if _abandoned(old / _LOCK):
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home))
    try:
        with (folder / _LOCK).open("w") as file:
            with _lock_free():
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock_free() -> contextlib.AbstractContextManager[Any]:
    return contextlib.suppress(ImportError, OSError)  # no such locks on this platform or disk


def _abandoned(lock: Path) -> bool:
    """Tell whether the process that held the lock is gone. A lock survives no process."""
    import fcntl

    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # held, or not made yet, or not ours
    return True
