"""A run's folder: made, locked, described, resumed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import guywire
from guywire.core import writing
from guywire.core.errors import DataError, GuywireError, UsageError
from guywire.lab.streams import Stream
from guywire.lab.training import locks
from guywire.lab.training.config import CompareConfig, parse
from guywire.lab.training.tables import differences, parse_toml, read_toml, to_toml

__all__ = ["RunFolder", "default_folder", "list_runs"]

_CONFIG, _RUN, _STREAM = "config.toml", "run.json", "stream.json"
# What may differ when a run is resumed: none of these changes a result.
_FREE = ("workers", "out", "on", "ray", "checkpoint", "track")
_PACKAGES = ("torch", "numpy", "safetensors", "pydantic", "scikit-learn", "transformers")


def default_folder(config: CompareConfig) -> Path:
    """Return a new folder's name in ``runs``: the data, the scenario and the time.

    Args:
        config: the comparison.

    Returns:
        A path that does not exist yet.
    """
    data = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(config.stream.data).stem).strip("-") or "run"
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    base = folder = Path("runs") / f"{data}-{config.stream.scenario}-{stamp}"
    number = 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


class RunFolder:
    """The folder of one comparison.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials = path / "trials"
        self.results = path / "results.parquet"

    def stored(self) -> dict[str, Any] | None:
        """Return the settings that the run in this folder was started with.

        Returns:
            The tables of ``config.toml``, or of its copy in ``run.json`` if it was cut short or is
            gone; ``None`` if there is neither.

        Raises:
            DataError: it was changed since, or is not TOML.
        """
        text = self._settings()
        try:
            return None if text is None else parse_toml(text)
        except ValueError as error:
            raise DataError(
                f"the settings in {self.path} are not TOML ({error}): put the originals back, or "
                "choose another --out"
            ) from error

    def _settings(self) -> str | None:
        # TOML cut between two lines is still TOML, and what is missing would silently take its
        # default: so run.json has a copy.
        path = self.path / _CONFIG
        copy: str | None = None
        with contextlib.suppress(DataError):
            kept_copy = self.facts().get("config")
            copy = kept_copy if isinstance(kept_copy, str) else None
        if not path.is_file():
            return copy
        raw = path.read_bytes()
        if copy is None:
            if read_toml(path):
                return raw.decode()
            raise DataError(f"{path} is empty: put the original back, or choose another --out")
        if copy.encode().startswith(raw):
            return copy
        with contextlib.suppress(ValueError):
            found, kept = parse_toml(raw.decode()), parse_toml(copy)
            if all(key.split(".")[0] in _FREE for key in differences(kept, found)):
                return raw.decode()
        raise DataError(
            f"{path} is damaged or was changed since the run began: delete it (run.json has a copy) "
            "and go on with --resume, or choose another --out for other settings"
        )

    def prepare(self, config: CompareConfig, *, resume: bool) -> bool:
        """Make the folder, or see that it fits.

        Args:
            config: as resolved.
            resume: go on with the run that is there.

        Returns:
            True if there is a run to go on with.

        Raises:
            UsageError: the folder is not empty, or holds a run with other settings.
            CheckpointError: it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out {self.path} is a file: name a folder")
        entries = [] if not self.path.is_dir() else sorted(p.name for p in self.path.iterdir())
        entries = [name for name in entries if name != locks.FILE and not name.endswith(".tmp")]
        stored = self.stored()
        if stored is None and entries == [self.trials.name] and not any(self.trials.iterdir()):
            entries = []  # a start that was killed before it had written anything
        if entries and not resume:
            hint = "add --resume to go on with the run in it, or " if stored is not None else ""
            raise UsageError(f"--out {self.path} is not empty: {hint}choose another folder")
        if stored is not None:
            self._compare(parse(CompareConfig, stored, str(self.path / _CONFIG)), config)
            return True
        if entries:
            raise UsageError(
                f"{self.path} holds {entries[0]!r} but no run to resume (no {_CONFIG}): "
                "choose another folder"
            )
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise writing.cannot_write(self.path, error) from error
        return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder.

        Yields:
            Nothing.

        Raises:
            UsageError: another process is at work in it.
            CheckpointError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / locks.FILE).open("w")
        except OSError as error:
            raise writing.cannot_write(self.path, error) from error
        with file:
            locks.take(file, self.path)
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove what writers left that were killed; nobody else is at work here."""
        for pattern in (".*.tmp", "samples/.*.tmp", "trials/*/.*.tmp", "sweep/*/.*.tmp"):
            for leftover in self.path.glob(pattern):
                with contextlib.suppress(OSError):
                    leftover.unlink()

    def describe(self, config: CompareConfig, stream: Stream) -> None:
        """Write ``config.toml``, ``stream.json`` and the samples of each task.

        A run that goes on keeps its settings; what was lost or cut short is written again.

        Args:
            config: as resolved.
            stream: the data.

        Raises:
            CheckpointError: a file cannot be written.
        """
        text = self._settings()
        writing.write_text(self.path / _CONFIG, to_toml(config) if text is None else text)
        writing.write_json(self.path / _STREAM, stream.describe())
        if stream.kind == "image":
            import io

            try:
                (self.path / "samples").mkdir(exist_ok=True)
            except OSError as error:
                raise writing.cannot_write(self.path / "samples", error) from error
            for index in range(len(stream.tasks)):
                buffer = io.BytesIO()
                stream.montage(index).save(buffer, format="PNG")
                writing.write_bytes(self.path / "samples" / f"task-{index}.png", buffer.getvalue())

    def note(self, **facts: Any) -> None:
        """Add facts to ``run.json``.

        Args:
            facts: names to values.

        Raises:
            CheckpointError: it cannot be written.
        """
        writing.write_json(self.path / _RUN, {**self.facts(), **facts})

    def started(self, command: Sequence[str], config: CompareConfig | None = None) -> None:
        """Write down who started what, where and when; a resumed run keeps its first start.

        Args:
            command: as typed.
            config: as resolved, of which a copy is kept unless there are settings already.
        """
        before = self.facts()
        settings = self._settings()
        if settings is None and config is not None:
            settings = to_toml(config)
        self.note(
            command=shlex.join(command),
            versions=_versions(),
            machine=_machine(),
            started=before.get("started", now()),
            resumed=[*before.get("resumed", []), now()] if before else [],
            finished=None,
            status="running",
            failed={},
            config=settings,
        )

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Write into ``run.json`` how the work ended if it ended early, where that can be written.

        Yields:
            Nothing.
        """
        try:
            yield
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(GuywireError):
                if (self.path / _RUN).is_file():
                    self.note(status=status, finished=now())
            raise

    def facts(self) -> dict[str, Any]:
        """Return what ``run.json`` says.

        Returns:
            Its content, empty if there is none.

        Raises:
            DataError: it is damaged.
        """
        path = self.path / _RUN
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds no JSON object")
            return found
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged ({error}): delete it and go on with --resume"
            ) from error

    def _compare(self, old: CompareConfig, new: CompareConfig) -> None:
        # A study can move: it is made again in another database from the trials' files.
        free: Any = {**dict.fromkeys(_FREE, True), "sweep": {"storage"}}
        before, after = (c.model_dump(mode="json", exclude=free) for c in (old, new))
        changed = differences(before, after)
        if changed:
            key = changed[0]
            raise UsageError(
                f"the run in {self.path} has {key} = {_at(before, key)!r}, now it is "
                f"{_at(after, key)!r}: leave that setting alone to resume, or choose another --out"
            )


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """List the runs in a folder, newest first.

    Args:
        folder: where they are.

    Returns:
        Of each: ``path``, ``status``, ``started``, ``finished``, ``data``, ``scenario``,
        ``methods``, ``seeds``, ``trials_done``, ``trials``, ``report``. A damaged run has the
        status ``damaged``.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: give the one that holds runs")
    candidates = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
    found = [_summary(p) for p in candidates if (p / _CONFIG).is_file() or (p / _RUN).is_file()]
    return sorted(found, key=lambda run: str(run["started"] or ""), reverse=True)


def now() -> str:
    """Return the present time in UTC.

    Returns:
        ISO 8601, to the second.
    """
    return datetime.now(UTC).isoformat(timespec="seconds")


def _summary(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    entry: dict[str, Any] = {"path": str(path), "status": "damaged", "started": None}
    try:
        facts = run.facts()
        config = parse(CompareConfig, run.stored() or {})
    except ValueError as error:
        return entry | {"error": str(error)}
    status = facts.get("status", "unknown")
    if status == "running" and not locks.is_locked(path):
        status = "killed"
    report = path / "report.html"
    return {
        "path": str(path),
        "status": status,
        "started": facts.get("started"),
        "finished": facts.get("finished"),
        "data": config.stream.data,
        "scenario": config.stream.scenario,
        "methods": list(config.methods),
        "seeds": len(config.seed_list),
        "trials_done": len(list(path.glob("trials/*/result.json"))),
        "trials": len(config.methods) * len(config.seed_list),
        "report": str(report) if report.is_file() else None,
    }


def _versions() -> dict[str, str]:
    versions = {"guywire": guywire.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _at(table: Mapping[str, Any], key: str) -> Any:
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
