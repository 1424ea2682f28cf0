"""Follow a comparison and tell trackers, in a thread of its own, so that none can hold it up."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from guywire.core import writing
from guywire.core.errors import GuywireError, need
from guywire.lab.tracking.choose import make
from guywire.lab.tracking.events import Began, Ended, Event, Scalar, Tracker, TrialEnded
from guywire.lab.training import METRICS, CompareConfig, Outcome

__all__ = ["Follower"]

_LEDGER = "tracking.json"
_FILES = ("report.html", "results.parquet", "config.toml")


class Follower:
    """Turn the callbacks of :func:`guywire.lab.training.compare` into events for trackers.

    Which trials a tracker was told is written into ``tracking.json`` of the run's folder after each,
    so that a resumed run tells the others only. (A kill between the two tells a trial twice, unless
    the tracker looks first; those of MLflow and TensorBoard do.) A tracker that raises is told
    nothing more in this process; ``--resume`` tells it what it missed.

    Args:
        words: the trackers, see :func:`guywire.lab.tracking.make`.
        warn: called with a sentence when a tracker fails.
        patience: seconds that ``end`` waits for trackers that are behind.

    Raises:
        UsageError: there is no such tracker.
        MissingExtraError: its package is not installed.
    """

    def __init__(
        self, words: Sequence[str], warn: Callable[[str], None], patience: float = 120.0
    ) -> None:
        self.trackers: dict[str, Tracker] = make(words)
        self.warn = warn
        self.patience = patience
        self.folder = Path()
        self.told: dict[str, list[str]] = {}
        self.run = ""
        self._queue: queue.SimpleQueue[Callable[[], Event] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, folder: Path, config: CompareConfig) -> None:
        """Begin to tell.

        Args:
            folder: the run's folder.
            config: as resolved.
        """
        if not self.trackers:
            return
        self.folder = folder
        self._read()
        self._thread = threading.Thread(target=self._tell, daemon=True, name="tracking")
        self._thread.start()
        params = flat(config.model_dump(mode="json", exclude={"out", "workers", "track"}))
        self._queue.put(lambda: Began(self.run, folder, params))

    def trial(self, outcome: Outcome) -> None:
        """Tell of a trial that ended.

        Args:
            outcome: what became of it; failed trials are told at the end.
        """
        if self._thread is not None and outcome.result is not None:
            self._queue.put(lambda: trial_event(self.run, self.folder, outcome))

    def end(
        self,
        status: str,
        table: Sequence[Mapping[str, Any]] = (),
        failed: Mapping[str, str] | None = None,
    ) -> None:
        """Tell that the comparison ended, and wait until all is told.

        Args:
            status: ``done``, ``failed`` or ``interrupted``.
            table: one dict a method, see :func:`guywire.lab.training.aggregate`.
            failed: trials to why they failed.
        """
        if self._thread is None:
            return
        files = [self.folder / name for name in _FILES if (self.folder / name).is_file()]
        self._queue.put(
            lambda: Ended(self.run, self.folder, status, means(table), dict(failed or {}), files)
        )
        self._queue.put(None)
        patience = self.patience if status != "interrupted" else min(10.0, self.patience)
        self._thread.join(patience)
        if self._thread.is_alive():
            names = ", ".join(self.trackers)
            self.warn(
                f"tracking by {names} is not through after {patience:g} s and is given up; "
                "the results are whole, --resume tells the rest"
            )
        self._thread = None

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:  # an error flew past end()
            self._queue.put(None)

    def _tell(self) -> None:
        live = dict(self.trackers)
        while (make_event := self._queue.get()) is not None:
            try:
                event = make_event()
            except Exception as error:
                self.warn(f"tracking: a trial's files cannot be read ({error})")
                continue
            for name, tracker in list(live.items()):
                told = self.told.setdefault(name, [])
                trial = event.name if isinstance(event, TrialEnded) else None
                if trial in told:
                    continue
                try:
                    tracker.log(event)
                    if trial is not None:
                        told.append(trial)
                        self._write()
                except Exception as error:  # a server that is down must not cost a comparison
                    del live[name]
                    self.warn(
                        f"tracking by {name} stopped ({_short(error)}); the comparison goes on, "
                        "--resume tells what it missed"
                    )

    def _read(self) -> None:
        import json

        path = self.folder / _LEDGER
        found: dict[str, Any] = {}
        if path.is_file():
            with contextlib.suppress(ValueError, OSError):  # damaged: tell all again
                found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("run"), str):
            found = {"run": uuid.uuid4().hex, "told": {}}
        self.run = found["run"]
        told = found.get("told")
        told = told if isinstance(told, dict) else {}
        self.told = {name: list(trials) for name, trials in told.items()}
        with contextlib.suppress(GuywireError):  # the comparison meets a full disk by itself
            self._write()

    def _write(self) -> None:
        writing.write_json(self.folder / _LEDGER, {"run": self.run, "told": self.told})


def trial_event(run: str, folder: Path, outcome: Outcome) -> TrialEnded:
    """Read what a finished trial left.

    Args:
        run: the id of the comparison.
        folder: the run's folder.
        outcome: of the trial; it has a result.

    Returns:
        The event.
    """
    spec, result = outcome.spec, outcome.result or {}
    parts = dict.fromkeys([spec.method, *spec.method.split("+")])
    params = flat(
        {
            "method": spec.method,
            "seed": spec.seed,
            **{part: spec.options[part] for part in parts if part in spec.options},
        }
    )
    metrics = {
        f"final/{name}": float(value)
        for name, value in result.get("metrics", {}).items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    path = folder / "trials" / spec.id / "metrics.parquet"
    return TrialEnded(run, folder, spec.id, params, curves(path), metrics)


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the curves of a trial.

    Args:
        path: its ``metrics.parquet``.

    Returns:
        ``loss`` and ``accuracy/task-<i>`` to points, by step; empty if there is no such file.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    if not path.is_file():
        return found
    table = need("pyarrow.parquet", extra="cli").read_table(path).to_pydict()
    for step, evaluated, metric, value in zip(
        table["step"], table["evaluated"], table["metric"], table["value"], strict=True
    ):
        if value is not None and math.isfinite(value):
            name = metric if evaluated < 0 else f"{metric}/task-{evaluated}"
            found.setdefault(name, []).append((int(step), float(value)))
    return {name: sorted(points) for name, points in found.items()}


def means(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Flatten the table of results.

    Args:
        table: one dict a method.

    Returns:
        ``METHOD/METRIC`` to the mean, ``.../low`` and ``.../high`` to the ends of its interval.

    Example:
        >>> means([{"method": "l2", "accuracy": {"mean": 0.5, "low": 0.25, "high": None}}])
        {'l2/accuracy': 0.5, 'l2/accuracy/low': 0.25}
    """
    found: dict[str, float] = {}
    for entry in table:
        for metric in METRICS:
            for end, value in (entry.get(metric) or {}).items():
                if value is not None:
                    name = f"{entry['method']}/{metric}"
                    found[name if end == "mean" else f"{name}/{end}"] = float(value)
    return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Flatten nested tables; lists become words with commas, ``None`` is left out.

    Args:
        tree: the tables.
        prefix: before every name.

    Returns:
        Dotted names to plain values.

    Example:
        >>> flat({"a": {"b": 1, "c": None}, "d": ["x", "y"]})
        {'a.b': 1, 'd': 'x,y'}
    """
    found: dict[str, Scalar] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            found[name] = ",".join(map(str, value))
        elif value is not None:
            found[name] = value
    return found


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
